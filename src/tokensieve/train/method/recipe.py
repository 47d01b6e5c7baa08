"""The settings of the training of a net."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from tokensieve.train.recipe import AnswerRecipe


@dataclass(frozen=True)
class Recipe(AnswerRecipe):
    """The settings of a training; further ones are the base's.

    Gates make their passes over the collected features, in batches of 256.

    Attributes:
        rate: peak learning rate of AdamW, after a linear rise and before half a cosine.
    """

    rate: float = 1e-4
    distillation: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("rate")

    def arguments(self, output: Path, device: torch.device) -> TrainingArguments:
        """Convert to the arguments of transformers' Trainer."""
        return self.arguments_for(output, device, self.rate)

    def to_json(self) -> dict[str, Any]:
        """Return the settings for the record of the training."""
        return dict(vars(self))

    @classmethod
    def of(cls, learns: Literal["answers", "exits", "twig"], **settings: Any) -> Recipe:
        """Return a recipe with the given settings; by default gates learn faster, and for longer, than a scorer.

        A twig has no teacher by default, as in its paper.
        """
        defaults = {"answers": {}, "exits": {"epochs": 60.0, "rate": 1e-3}, "twig": {"distillation": 0.0}}[learns]
        return cls(**defaults | {name: value for name, value in settings.items() if value is not None})
