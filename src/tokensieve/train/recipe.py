"""The settings that trainings on questions and answers share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from tokensieve.errors import Refusal


@dataclass(frozen=True)
class AnswerRecipe:
    """Settings of the passes, the loss and the checkpoints; the rate is that of the kind of training.

    Attributes:
        epochs, batch_size, accumulate: passes over the records, records per step and device, steps per update.
        warmup, decay: the share of the steps in which the rate rises; AdamW's weight decay.
        distillation: weight of the KL divergence from the unreduced model, at the answers' positions.
        checkpoints: the share of the steps after which a checkpoint is written.
        prompt: text of the user turn; ``{question}`` is replaced.

    Raises:
        Refusal: naming the setting, its value and what is allowed.
    """

    epochs: float = 1.0
    batch_size: int = 16
    accumulate: int = 1
    warmup: float = 0.03
    decay: float = 0.0
    distillation: float = 0.0
    checkpoints: float = 0.1
    prompt: str = "{question}"
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_positive("epochs", "batch_size", "accumulate", "checkpoints")
        if not 0 <= self.warmup < 1:
            raise Refusal(f"warmup must be a share in [0, 1); got {self.warmup}")
        if self.distillation < 0:
            raise Refusal(f"distillation must be at least 0; got {self.distillation}")
        if "{question}" not in self.prompt:
            raise Refusal(f"the prompt must contain {{question}}; got {self.prompt!r}")

    def check_positive(self, *names: str) -> None:
        """Refuse a setting that is not larger than 0."""
        for name in names:
            if getattr(self, name) <= 0:
                raise Refusal(f"{name} must be larger than 0; got {getattr(self, name)}")

    def arguments_for(self, output: Path, device: torch.device, rate: float, **further: Any) -> TrainingArguments:
        """Convert to the arguments of transformers' Trainer, with this peak rate and ``further`` ones."""
        return TrainingArguments(
            output_dir=str(output),
            num_train_epochs=1,  # the records are listed once for each pass
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulate,
            learning_rate=rate,
            weight_decay=self.decay,
            lr_scheduler_type="cosine",
            warmup_steps=self.warmup,
            use_cpu=device.type == "cpu",  # otherwise bf16 on a CPU is refused
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
            **further,
        )
