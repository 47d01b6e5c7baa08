"""Train a net by the loss of the model's answers: the model is frozen, and gradients pass through it to the net."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import SequentialSampler

from tokensieve.engine.connector.shorten import padding_id
from tokensieve.engine.llm import LlmSieve
from tokensieve.evaluate.prompt import Inputs, generate_arguments, without_repetitions
from tokensieve.loading import to_model
from tokensieve.methods import TrainedMethod
from tokensieve.train.adapter.data import IGNORED
from tokensieve.train.adapter.loss import answer_loss, divergence
from tokensieve.train.adapter.shared import SharedPrompts
from tokensieve.train.method.recipe import Recipe
from tokensieve.train.trainer import QuietTrainer, finite


class MethodTrainer(QuietTrainer):
    """Train on the answers' loss, the divergence from the same model unreduced, and the method's own objective.

    The model that transformers sees is the net alone: nothing else is optimised, or stored in a checkpoint.

    Args:
        sieve: the handle of the method, attached to the frozen model.
    """

    def __init__(self, recipe: Recipe, sieve: LlmSieve, **options: Any) -> None:
        self.recipe, self.sieve, self.vlm = recipe, sieve, sieve.model
        (self.method,) = (method for method in sieve.methods if isinstance(method, TrainedMethod))
        self.idle = 0  # batches that used no weight of the net
        super().__init__(**options)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **ignored: Any) -> Any:
        labels, numbers = inputs["labels"], inputs["image_numbers"].tolist()
        prompts = {name: rows for name, rows in inputs.items() if name not in ("labels", "image_numbers")}
        once = without_repetitions(self.vlm, to_model(self.vlm, prompts), numbers)
        width = labels.shape[1] + 1  # each id is predicted by the column before
        with self._budget_of_step():
            logits = self._logits(once, width, labels if self.method.changes_text else None)
        loss = answer_loss(logits, labels)
        if self.recipe.distillation:
            with torch.no_grad(), self.sieve.paused():
                teacher = self._logits(once, width)
            loss = loss + self.recipe.distillation * divergence(logits, teacher, labels)
        decisions = [decision for images in self.sieve.last for decision in images]
        finite(loss)  # the objective of a net with NaN may fail before the loss is seen
        term = self.method.objective(decisions, self.state.global_step / self.state.max_steps)
        loss = loss if term is None else loss + term
        if not loss.requires_grad:  # no image of the batch has more tokens than the budget: the net was not used
            self.idle += 1
            loss = loss + 0.0 * torch.stack([weight.sum() for weight in model.parameters()]).sum()
        return (loss, {"logits": logits}) if return_outputs else loss

    def _budget_of_step(self) -> AbstractContextManager[None]:
        """Draw the budget by seed and step only, so that a resumed run draws it again."""
        if not self.recipe.keeps:
            return nullcontext()
        chance = random.Random(f"{self.recipe.seed}:{self.state.global_step}")
        return self.sieve.with_budget(chance.choice(self.recipe.keeps))

    def _logits(self, inputs: Inputs, width: int, labels: Tensor | None = None) -> Tensor:
        """Return the logits `[B, width - 1, V]` of the answers' ids.

        Args:
            labels: `[B, width - 1]`, for a method that changes the text: it leaves columns with a label unchanged.
        """
        if labels is not None:
            ids = inputs.tensors["input_ids"]
            whole = pad(labels.to(ids.device), (ids.shape[1] - labels.shape[1], 0), value=IGNORED)
            inputs = replace(inputs, tensors={**inputs.tensors, "labels": whole})
            whole_logits: Tensor = self.vlm(**generate_arguments(self.vlm, inputs), use_cache=False).logits
            return whole_logits[:, -width:-1].float()
        inside = self.method.info.stage == "decoder"  # such methods refuse a part of the logits
        part = {} if inside else {"logits_to_keep": width}
        shared = SharedPrompts.of(self.vlm, inputs, self.sieve.methods, padding_id(self.vlm))
        if shared is not None:
            logits = shared.logits(self.vlm, self.vlm, width, part)
        else:
            logits = self.vlm(**generate_arguments(self.vlm, inputs), **part, use_cache=False).logits
        return logits[:, -width:-1].float()

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)  # the records are listed in training order
