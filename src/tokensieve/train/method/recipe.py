"""The settings of the training of a net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods.trained import Learns
from tokensieve.train.recipe import AnswerRecipe


@dataclass(frozen=True)
class Recipe(AnswerRecipe):
    """The settings of a training; further ones are the base's.

    Gates make their passes over the collected features, in batches of 256.

    Attributes:
        rate: peak learning rate of AdamW, after a linear rise and before half a cosine.
        keeps: budgets of which each step draws one, for a method before the LLM; none: that of the method.
    """

    rate: float = 1e-4
    distillation: float = 1.0
    keeps: Sequence[Budget] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("rate")
        if not all(isinstance(keep, int | float) for keep in self.keeps):
            raise Refusal(f"budgets that are drawn must be numbers; got {', '.join(map(str, self.keeps))}")

    def arguments(self, output: Path, device: torch.device) -> TrainingArguments:
        """Convert to the arguments of transformers' Trainer."""
        return self.arguments_for(output, device, self.rate)

    def to_json(self) -> dict[str, Any]:
        """Return the settings for the record of the training."""
        return dict(vars(self))

    @classmethod
    def of(cls, learns: Learns, **settings: Any) -> Recipe:
        """Return a recipe with the given settings; by default gates learn faster, and for longer, than a scorer.

        A twig has no teacher by default, as in its paper.
        """
        defaults: dict[Learns, dict[str, float]] = {
            "answers": {},
            "exits": {"epochs": 60.0, "rate": 1e-3},
            "places": {"rate": 1e-3},
            "twig": {"distillation": 0.0},
        }
        return cls(**defaults[learns] | {name: value for name, value in settings.items() if value is not None})
