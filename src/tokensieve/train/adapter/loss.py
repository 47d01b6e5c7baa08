"""The answers' loss of a model with a method attached, and the divergence from the model as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from tokensieve.engine import attach
from tokensieve.engine.connector.shorten import padding_id
from tokensieve.engine.prompt.user_text import UserTextFinder
from tokensieve.engine.wrapped import unwrapped
from tokensieve.errors import Refusal
from tokensieve.evaluate.prompt import generate_arguments, without_repetitions
from tokensieve.methods import Method, parse
from tokensieve.train.adapter.data import IGNORED
from tokensieve.train.adapter.shared import SharedPrompts

Batch = Mapping[str, Tensor]
FULL = tuple(parse("full"))


def answer_logits(model: Any, batch: Batch, stages: Sequence[Method], processor: Any) -> Tensor:
    """Return the logits `[B, A, V]` of the answers' ids.

    Methods drop visual tokens only, and answers stand last in left-padded rows. So their columns are the last ones
    also where the sequence was shortened inside the LLM.

    Args:
        model: the model, or a PEFT model around it.
        batch: of :class:`~tokensieve.train.adapter.data.Collator`.
        stages: the method.
    """
    inner, width = unwrapped(model), batch["labels"].shape[1] + 1  # each id is predicted by the column before
    tensors = {name: value for name, value in batch.items() if name not in ("labels", "image_numbers")}
    inside = any(stage.info.stage == "decoder" for stage in stages)
    with attach(inner, list(stages), processor=processor):
        inputs = without_repetitions(inner, tensors, batch["image_numbers"].tolist())
        # decoder methods take all logits: they refuse a part, as the end of a prompt would be hidden
        part = {} if inside else {"logits_to_keep": width}
        shared = SharedPrompts.of(inner, inputs, stages, padding_id(inner))
        if shared is not None:
            return shared.logits(model, inner, width, part)[:, :-1].float()
        logits: Tensor = model(**generate_arguments(inner, inputs), **part, use_cache=False).logits
    return logits[:, -width:-1].float()


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the answers' ids, from `[B, A, V]` and `[B, A]`."""
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def divergence(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the mean KL divergence of the teacher's words from the model's, over the answers' ids."""
    answered = labels != IGNORED
    student, target = (part[answered].log_softmax(-1) for part in (logits, teacher))
    return kl_div(student, target, reduction="batchmean", log_target=True)


@torch.no_grad()
def teacher_logits(model: Any, batch: Batch, processor: Any) -> Tensor:
    """Return the logits of the PEFT model's base, with neither adapter nor method."""
    training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            return answer_logits(model, batch, FULL, processor)
    finally:
        model.train(training)


def check_method(stages: Sequence[Method], model: Any, processor: Any, batch: Batch) -> None:
    """Refuse a method that would see the answer, which in training stands at the end of the prompt.

    Args:
        batch: any batch; in its first row, the words that the method would take for the user's are looked at.

    Raises:
        Refusal: naming the method and what it reads.
    """
    row, label = batch["input_ids"][0].tolist(), batch["labels"][0]
    prompt = row[: len(row) - int((label != IGNORED).sum())]
    for stage in stages:
        needs, name = stage.needs, stage.info.name
        last = getattr(needs, "attention", None) == "last"
        if last or needs.requests("gradient") or needs.requests("query_attention"):
            raise Refusal(f"{name} goes by the end of the prompt, where the answer stands in training; use another one")
        if needs.requests("user_text"):
            finder = UserTextFinder(model, processor, needs.user_text == "all")  # type: ignore[attr-defined]
            if finder.columns(row) != finder.columns(prompt):
                raise Refusal(
                    f"{name} goes by the user's words, and would take the answer for some of them: with this chat "
                    "template and tokenizer the two are not told apart"
                )
