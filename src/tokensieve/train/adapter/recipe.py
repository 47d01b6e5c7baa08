"""The settings of a fine-tuning under reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from transformers import TrainingArguments

from tokensieve.budget import Budget
from tokensieve.errors import Refusal, nearest
from tokensieve.train.adapter.schedule import Schedule
from tokensieve.train.recipe import AnswerRecipe

Parts: TypeAlias = Literal["projector", "lora", "all"]
RATES: dict[Parts, float] = {"projector": 2e-4, "lora": 2e-4, "all": 2e-5}


@dataclass(frozen=True)
class Recipe(AnswerRecipe):
    """Settings: the tuned parts, the methods by step, and the optimisation; further ones are the base's.

    Attributes:
        phases: method specs by the share of the steps at which they start; each step draws one of them.
        keeps: budgets of the specs that leave theirs open.
        joint: each step runs all of its phase's methods and budgets, and averages their losses, as in M3.
        parts: "projector" and "lora" train low-rank adapters on the linear layers of the projector, or of projector
            and LLM; "all" trains the weights of projector, LLM and output head. The vision encoder is frozen.
        rank, alpha: of the adapters, whose change is scaled by ``alpha / rank``; ``alpha=None`` is twice the rank.
        distillation: weight of the KL divergence from the model with neither method nor adapter, at answer positions.
        rate: peak learning rate, after a linear rise and before half a cosine; ``None``: 2e-4 for adapters, else 2e-5.
        precision: "bf16", "fp16" or "fp32".

    Raises:
        Refusal: naming the setting, its value and what is allowed.
    """

    phases: Mapping[float, Sequence[str]] = field(default_factory=lambda: {0.0: ("pool",)})
    keeps: Sequence[Budget] = (1.0, 0.25, 0.11, 0.05)
    joint: bool = False
    parts: Parts = "lora"
    rank: int = 16
    alpha: int | None = None
    rate: float | None = None
    checkpoints: float = 0.05
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.parts not in get_args(Parts):
            raise Refusal(f"parts must be one of {', '.join(get_args(Parts))}; {nearest(self.parts, get_args(Parts))}")
        if self.precision not in ("bf16", "fp16", "fp32"):
            raise Refusal(f"precision must be bf16, fp16 or fp32; got {self.precision!r}")
        super().__post_init__()
        self.check_positive("rank", "peak_rate", "scale")
        if self.distillation and self.parts == "all":
            raise Refusal(
                "distillation learns from the model without its adapter, and parts='all' changes the model itself: "
                "use 'lora' or 'projector', or distillation=0"
            )

    @property
    def peak_rate(self) -> float:
        return RATES[self.parts] if self.rate is None else self.rate

    @property
    def scale(self) -> int:
        """``alpha`` of the adapters."""
        return 2 * self.rank if self.alpha is None else self.alpha

    def schedule(self) -> Schedule:
        return Schedule.of(self.phases, self.keeps)

    def arguments(self, output: Path, device: torch.device) -> TrainingArguments:
        """Convert to the arguments of transformers' Trainer."""
        half = {"bf16": self.precision == "bf16", "fp16": self.precision == "fp16"}
        return self.arguments_for(output, device, self.peak_rate, **half)

    def to_json(self) -> dict[str, Any]:
        """Return the settings beside methods and budgets, which stand in the schedule."""
        chosen = {name: value for name, value in asdict(self).items() if name not in ("phases", "keeps")}
        return chosen | {"rate": self.peak_rate, "alpha": self.scale}
