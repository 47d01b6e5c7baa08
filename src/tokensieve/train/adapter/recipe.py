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

Parts: TypeAlias = Literal["projector", "lora", "all"]
RATES: dict[Parts, float] = {"projector": 2e-4, "lora": 2e-4, "all": 2e-5}


@dataclass(frozen=True)
class Recipe:
    """Settings: the tuned parts, the methods by step, and the optimisation.

    Attributes:
        phases: method specs by the share of the steps at which they start; each step draws one of them.
        keeps: budgets of the specs that leave theirs open.
        joint: each step runs all of its phase's methods and budgets, and averages their losses, as in M3.
        parts: "projector" and "lora" train low-rank adapters on the linear layers of the projector, or of projector
            and LLM; "all" trains the weights of projector, LLM and output head. The vision encoder is frozen.
        rank, alpha: of the adapters, whose change is scaled by ``alpha / rank``; ``alpha=None`` is twice the rank.
        distillation: weight of the KL divergence from the model with neither method nor adapter, at answer positions.
        epochs, batch_size, accumulate: passes over the records, records per step and device, steps per update.
        rate: peak learning rate, after a linear rise and before half a cosine; ``None``: 2e-4 for adapters, else 2e-5.
        warmup, decay: the share of the steps in which the rate rises; AdamW's weight decay.
        checkpoints: the share of the steps after which a checkpoint is written.
        precision: "bf16", "fp16" or "fp32".
        prompt: text of the user turn; ``{question}`` is replaced.

    Raises:
        Refusal: naming the setting, its value and what is allowed.
    """

    phases: Mapping[float, Sequence[str]] = field(default_factory=lambda: {0.0: ("pool",)})
    keeps: Sequence[Budget] = (1.0, 0.25, 0.11, 0.05)
    joint: bool = False
    parts: Parts = "lora"
    rank: int = 16
    alpha: int | None = None
    distillation: float = 0.0
    epochs: float = 1.0
    batch_size: int = 16
    accumulate: int = 1
    rate: float | None = None
    warmup: float = 0.03
    decay: float = 0.0
    checkpoints: float = 0.05
    precision: str = "fp32"
    prompt: str = "{question}"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.parts not in get_args(Parts):
            raise Refusal(f"parts must be one of {', '.join(get_args(Parts))}; {nearest(self.parts, get_args(Parts))}")
        if self.precision not in ("bf16", "fp16", "fp32"):
            raise Refusal(f"precision must be bf16, fp16 or fp32; got {self.precision!r}")
        for name in ("epochs", "batch_size", "accumulate", "rank", "peak_rate", "scale", "checkpoints"):
            if getattr(self, name) <= 0:
                raise Refusal(f"{name} must be larger than 0; got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise Refusal(f"warmup must be a share in [0, 1); got {self.warmup}")
        if self.distillation < 0:
            raise Refusal(f"distillation must be at least 0; got {self.distillation}")
        if self.distillation and self.parts == "all":
            raise Refusal(
                "distillation learns from the model without its adapter, and parts='all' changes the model itself: "
                "use 'lora' or 'projector', or distillation=0"
            )
        if "{question}" not in self.prompt:
            raise Refusal(f"the prompt must contain {{question}}; got {self.prompt!r}")

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
        return TrainingArguments(
            output_dir=str(output),
            num_train_epochs=1,  # the records are listed once for each pass
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulate,
            learning_rate=self.peak_rate,
            weight_decay=self.decay,
            lr_scheduler_type="cosine",
            warmup_steps=self.warmup,
            use_cpu=device.type == "cpu",  # otherwise bf16 on a CPU is refused
            bf16=self.precision == "bf16",
            fp16=self.precision == "fp16",
            seed=self.seed,
            save_strategy="steps",
            save_steps=min(self.checkpoints, 0.999),  # a share; 1 would be one step
            save_total_limit=2,
            logging_steps=10,
            logging_nan_inf_filter=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the settings beside methods and budgets, which stand in the schedule."""
        chosen = {name: value for name, value in asdict(self).items() if name not in ("phases", "keeps")}
        return chosen | {"rate": self.peak_rate, "alpha": self.scale}
