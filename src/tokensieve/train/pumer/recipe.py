"""PuMer's recipe: its settings, the Trainer with distillation, and the groups of learning rates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import EarlyStoppingCallback, TrainingArguments

from tokensieve.errors import Refusal
from tokensieve.train.pumer.tasks import Task, accuracy
from tokensieve.train.trainer import QuietTrainer

HEAD = ("classifier", "rank_output", "itm_score")
CROSS_MODAL = "cross_modal"
TWO_STREAMS = {"rate": 5e-6, "head_rate": 50.0, "cross_rate": 5.0}
RATES: dict[str, dict[str, Any]] = {"meter": TWO_STREAMS, "bridgetower": TWO_STREAMS}


@dataclass(frozen=True)
class Recipe:
    """The settings of PuMer's fine-tuning. Defaults are the paper's for ViLT; :meth:`for_model` has two-stream ones.

    Attributes:
        epochs, batch_size, accumulate: passes over the data, records per step and device, steps per update.
        rate: peak learning rate; ``head_rate`` and ``cross_rate`` multiply it for the new head and for the cross-modal
            layers of a two-stream encoder.
        decay, warmup: AdamW's weight decay; the share of all steps in which the rate rises, before it falls linearly.
        distillation: weight of the KL divergence from the teacher, beside the task's loss.
        patience: evaluations without improvement before training stops; 0 never stops early.
        negatives: other texts per image in retrieval.
        precision: "bf16", "fp16" or "fp32".
        workers: processes that load images.
    """

    epochs: float = 20
    batch_size: int = 32
    accumulate: int = 1
    rate: float = 1e-4
    head_rate: float = 10
    cross_rate: float = 1
    decay: float = 0.01
    warmup: float = 0.1
    distillation: float = 1.0
    patience: int = 3
    negatives: int = 15
    precision: str = "fp32"
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp16", "fp32"):
            raise Refusal(f"precision must be bf16, fp16 or fp32; got {self.precision!r}")
        for name in ("epochs", "batch_size", "accumulate", "rate", "head_rate", "cross_rate"):
            if getattr(self, name) <= 0:
                raise Refusal(f"{name} must be larger than 0; got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise Refusal(f"warmup must be a share in [0, 1); got {self.warmup}")

    @classmethod
    def for_model(cls, model_type: str, **settings: Any) -> Recipe:
        """Return a recipe with the given settings and the paper's rates for this kind of model as defaults."""
        return cls(**{**RATES.get(model_type, {}), **{name: v for name, v in settings.items() if v is not None}})

    def arguments(self, output: Path, *, evaluates: bool) -> TrainingArguments:
        """Convert to the arguments of transformers' Trainer."""
        strategy = "epoch" if evaluates else "no"
        return TrainingArguments(
            output_dir=str(output),
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulate,
            learning_rate=self.rate,
            weight_decay=self.decay,
            lr_scheduler_type="polynomial",
            warmup_steps=self.warmup,
            use_cpu=not torch.accelerator.is_available(),  # otherwise bf16 on a CPU is refused
            bf16=self.precision == "bf16",
            fp16=self.precision == "fp16",
            dataloader_num_workers=self.workers,
            seed=self.seed,
            eval_strategy=strategy,
            save_strategy="epoch",
            save_total_limit=2,
            load_best_model_at_end=evaluates,
            metric_for_best_model="accuracy" if evaluates else None,
            logging_steps=50,
            logging_nan_inf_filter=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
        )


class PumerTrainer(QuietTrainer):
    """Train on task loss and distillation from the unreduced teacher."""

    def __init__(self, recipe: Recipe, task: Task, teacher: Any, **options: Any) -> None:
        self.recipe, self.task, self.teacher = recipe, task, teacher
        stops_early = options.get("eval_dataset") is not None and recipe.patience
        super().__init__(compute_metrics=accuracy, **options)
        if stops_early:
            self.add_callback(EarlyStoppingCallback(recipe.patience))
        if teacher is not None:
            teacher.to(self.args.device)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **ignored: Any) -> Any:
        targets = inputs["labels"]
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        logits = self._rows(model(**model_inputs).logits, targets)
        loss = self.task.loss(logits, targets)
        if self.teacher is not None and model.training:
            with torch.no_grad():
                teacher = self._rows(self.teacher(**model_inputs).logits, targets).log_softmax(-1)
            divergence = kl_div(logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True)
            loss = loss + self.recipe.distillation * divergence
        return (loss, {"logits": logits}) if return_outputs else loss

    def _rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.task.ranked(logits).reshape(targets.shape).float()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer: torch.optim.Optimizer
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(groups(self.model, self.recipe), lr=self.recipe.rate)
        return self.optimizer


def groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Group parameters by learning rate (head, cross-modal layers, others) and by weight decay (matrices only)."""
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = recipe.head_rate if name.startswith(HEAD) else recipe.cross_rate if CROSS_MODAL in name else 1.0
            decay = recipe.decay if parameter.ndim > 1 else 0.0
            grouped.setdefault((recipe.rate * scale, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in grouped.items()]
