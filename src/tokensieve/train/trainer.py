"""Transformers' Trainer as the recipes use it: a bar on stderr, and checkpoints that are whole or not used."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokensieve.errors import MissingExtra, Refusal

log = logging.getLogger(__name__)
STATE = "trainer_state.json"  # transformers writes it last


class QuietTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Show progress on stderr, and warn if a checkpoint cannot be written. Stdout is for results."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for printer in (PrinterCallback, ProgressCallback):  # they write to stdout
            self.remove_callback(printer)
        self._bar = _Bar()
        self.add_callback(self._bar)
        if self.args.save_steps < 1:  # a share: a checkpoint holds it as a number, and the next run compares both
            steps = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
            self.args.save_steps = math.ceil(steps * self.args.num_train_epochs * self.args.save_steps)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch, so accumulation must average it

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as transformers does, and end the line of the bar, so that an error stands on a line of its own."""
        try:
            return super().train(*args, **options)
        finally:
            if self._bar.training_bar is not None:
                self._bar.training_bar.close()

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Run a step as transformers does; raises as :func:`finite`."""
        return finite(super().training_step(*args, **options))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            part = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            shutil.rmtree(part, ignore_errors=True)
            log.warning("checkpoint not written, the last good one stays: %s", error)


class _Bar(ProgressCallback):  # type: ignore[misc]
    """A progress bar on stderr that shows the loss."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **ignored: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=logs["loss"])


def finite(loss: Tensor) -> Tensor:
    """Return the loss of a step.

    Raises:
        Refusal: it is infinite or not a number, as is then every parameter that it trains.
    """
    if not loss.isfinite():
        raise Refusal(f"the training diverged: the loss is {loss.item()}; give a lower --rate, and --no-resume")
    return loss


def last_checkpoint(folder: Path) -> str | None:
    """Return the latest whole checkpoint in a folder: one of a killed run may lack files, and is passed over."""
    checkpoints = [
        (int(match[1]), path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (match := _NUMBER(path.name))
    ]
    for _, path in sorted(checkpoints, reverse=True):
        try:
            json.loads((path / STATE).read_text("utf-8"))
        except (OSError, ValueError):
            log.warning("%s is not whole, and is not used", path)
            continue
        return str(path)
    return None


_NUMBER = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)").fullmatch


def check_train_extra() -> None:
    """Refuse to train without accelerate, which transformers' Trainer needs."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise MissingExtra("training needs accelerate", "train") from None
