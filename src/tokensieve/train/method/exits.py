"""Train gates that let visual tokens leave the LLM, on states that the frozen model is asked for once."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tokensieve.engine import attach
from tokensieve.evaluate import Sample
from tokensieve.evaluate.prompt import encode, generate_arguments, image_numbers, without_repetitions
from tokensieve.loading import to_model
from tokensieve.methods import Method, parse
from tokensieve.train.adapter.data import Collator
from tokensieve.train.adapter.loss import answer_logits
from tokensieve.train.method.recipe import Recipe

log = logging.getLogger(__name__)
EXAMPLES = 256  # per step: the gates are small


@runtime_checkable
class ExitMethod(Protocol):
    """A method whose gates are trained here; logit(leave) − logit(stay) must exceed its threshold."""

    def may_leave(self, whole: Tensor, early: Tensor, labels: Tensor) -> Tensor:
        """Return the labels of one layer, `[B]` bool."""


@dataclass(frozen=True)
class Exits:
    """Examples for gates: the ``states`` `[E, G, F]` that G gates read, and the ``labels`` `[E, G]`, 1 to leave."""

    states: Tensor
    labels: Tensor

    def save(self, file: Path) -> None:
        """Write the examples; a reader never sees half a file."""
        part = file.with_suffix(".part")
        save_file({"states": self.states, "labels": self.labels}, part)
        os.replace(part, file)

    @classmethod
    def load(cls, file: Path) -> Exits | None:
        """Return the stored examples; ``None`` if there are none."""
        try:
            return cls(**load_file(file))
        except (OSError, SafetensorError):
            return None


@torch.no_grad()
def collect(model: Any, processor: Any, stages: Sequence[Method], samples: Sequence[Sample], recipe: Recipe) -> Exits:
    """Return the examples of all samples: what the gates read of the prompt, and where its tokens may leave.

    Args:
        stages: the method, last, whose gates are asked and let no token leave; and methods that act before the LLM.
    """
    *before, method = stages
    assert isinstance(method, ExitMethod)
    never: dict[str, Any] = {"weights": "random", "threshold": float("inf")}
    closed: list[Any] = [*before, replace(method, **never)]
    collator, states, labels = Collator(processor, recipe.prompt), [], []
    with attach(model, closed, processor=processor) as sieve:
        gates = sieve.nets["decoder"]
        assert isinstance(gates, nn.ModuleList)
        for start in range(0, len(samples), recipe.batch_size):
            batch = samples[start : start + recipe.batch_size]
            read = _states(model, processor, gates, batch, recipe.prompt)
            if read is None:  # images of unequal size are decided about in other groups
                singles = [_states(model, processor, gates, [sample], recipe.prompt) for sample in batch]
                read = torch.cat([state for state in singles if state is not None])
            states.append(read)
    depth = states[0].shape[1]
    for start in range(0, len(samples), recipe.batch_size):
        inputs = to_model(model, collator(samples[start : start + recipe.batch_size]))
        whole = answer_logits(model, inputs, before or parse("full"), processor)
        left = ([*before, *parse("vtw", layer=layer)] for layer in range(1, depth + 1))
        early = (answer_logits(model, inputs, methods, processor) for methods in left)
        leaves = [method.may_leave(whole, logits, inputs["labels"]) for logits in early]
        labels.append(torch.stack(leaves, 1).long().cpu())
    return Exits(torch.cat(states), torch.cat(labels))


def _states(model: Any, processor: Any, gates: nn.ModuleList, samples: Sequence[Sample], prompt: str) -> Tensor | None:
    """Return what the gates read of one batch, `[B, G, F]`; ``None`` if not each was asked about all rows at once."""
    read: list[list[Tensor]] = [[] for _ in gates]
    handles = [
        gate.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].cpu()))
        for gate, rows in zip(gates, read, strict=True)
    ]
    try:
        inputs = to_model(model, encode(processor, samples, prompt=prompt))
        repeated = without_repetitions(model, inputs, image_numbers(samples))
        model(**generate_arguments(model, repeated), logits_to_keep=1, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if all(len(rows) == 1 and len(rows[0]) == len(samples) for rows in read):
        return torch.stack([rows[0] for rows in read], 1)
    # several images of one prompt: the gates read the same text for each
    return torch.stack([rows[0][:1] for rows in read], 1) if len(samples) == 1 else None


def fit(gates: nn.ModuleList, examples: Exits, recipe: Recipe) -> None:
    """Train each gate on its examples, in place."""
    gates.requires_grad_(True).train()
    order = torch.Generator().manual_seed(recipe.seed)
    count = len(examples.labels)
    steps = max(1, round(recipe.epochs * count / EXAMPLES))
    optimizer = torch.optim.AdamW(gates.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(count, (min(EXAMPLES, count),), generator=order)
        loss = torch.stack(
            [
                cross_entropy(gate(examples.states[chosen, number]), examples.labels[chosen, number])
                for number, gate in enumerate(gates)
            ]
        ).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    gates.requires_grad_(False).eval()


@torch.no_grad()
def agreement(gates: nn.ModuleList, examples: Exits) -> dict[str, list[float]]:
    """Return by gate the share of examples whose label it gives, and the share of the labels that say leave."""
    decided = torch.stack([gate(examples.states[:, number]).argmax(-1) for number, gate in enumerate(gates)], 1)
    right, leave = (decided == examples.labels).float().mean(0), examples.labels.float().mean(0)
    return {"gates_right": [round(v, 4) for v in right.tolist()], "may_leave": [round(v, 4) for v in leave.tolist()]}
