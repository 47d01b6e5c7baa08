"""The unmodified model on a few prompts: its greedy steps, and its rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tokensieve.budget import BudgetScope
from tokensieve.methods import Repair
from tokensieve.models.layout import Separators

Prompts: TypeAlias = Callable[[Sequence[int]], Mapping[str, Tensor]]
STEPS = 6
MARGIN = 8


@dataclass(frozen=True, eq=False)
class Generated:
    """Logits, tokens and cache of greedy steps on one batch.

    Attributes:
        logits: `[B, steps, vocabulary]`, float32, unprocessed.
        tokens: `[B, steps]`.
        columns: columns in the cache of each layer afterwards; 0 where a layer has no such cache.
    """

    inputs: Mapping[str, Tensor]
    logits: Tensor
    tokens: Tensor
    cache: Any
    columns: list[int]


class Runs:
    """The unmodified model on a few prompts; it runs once. The arguments are those of :class:`~tokensieve.check.Laws`.

    Attributes:
        unreduced: the batch, unmodified.
        floor: largest difference of a logit by rounding alone.
        allowed: largest deviation that counts as rounding.
    """

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        count: int = 3,
        processor: Any = None,
        budget_scope: BudgetScope = "image",
        separators: Separators = "kept-lines",
        repair: Repair | None = None,
        reselect: bool = False,
    ) -> None:
        self.model, self.token = model, int(model.config.image_token_id)
        self.processor, self.repair, self.reselect = processor, repair, reselect
        self.options: dict[str, Any] = {
            "budget_scope": budget_scope,
            "separators": separators,
            "repair": repair,
            "reselect": reselect,
        }
        self.batch, self.singles = prompts(range(count)), [prompts([i]) for i in range(count)]
        self.unreduced = self.generate(self.batch)
        # kernels of quantised layers round activations to half precision or 8 bits, whatever the dtype around them
        quantised = getattr(model, "is_quantized", False)
        self.precision = max(torch.finfo(model.dtype).eps, torch.finfo(torch.bfloat16).eps * quantised)
        rounding = [
            deviation(row_of(self.unreduced, i), self.generate(inputs)) for i, inputs in enumerate(self.singles)
        ]
        self.floor = max(self.precision * float(self.unreduced.logits.abs().max()), *rounding)
        self.allowed = MARGIN * self.floor

    def generate(self, inputs: Mapping[str, Tensor], **arguments: Any) -> Generated:
        """Generate ``STEPS`` tokens greedily, with placeholders suppressed."""
        placeholders = [self.token, getattr(self.model.config, "video_token_id", None)]
        with torch.inference_mode():
            out = self.model.generate(
                **inputs,
                **arguments,
                max_new_tokens=STEPS,
                min_new_tokens=STEPS,
                do_sample=False,
                num_beams=1,
                suppress_tokens=[i for i in placeholders if i is not None],
                return_dict_in_generate=True,
                output_logits=True,
            )
        held = [getattr(layer, "keys", None) for layer in out.past_key_values.layers]
        columns = [0 if keys is None else keys.shape[-2] for keys in held]
        logits, tokens = torch.stack(out.logits, 1).float(), out.sequences[:, -STEPS:]
        return Generated(inputs, logits, tokens, out.past_key_values, columns)


def row_of(batch: Generated, i: int) -> Generated:
    """Return one row of a batch."""
    return dataclasses.replace(batch, logits=batch.logits[i : i + 1], tokens=batch.tokens[i : i + 1])


def deviation(a: Generated, b: Generated) -> float:
    """Return the largest difference of logits over the steps before which both rows have generated equal tokens."""
    # a step's logits follow from the tokens before it, so the mask of equal prefixes is shifted by one step
    equal_prefix = (a.tokens == b.tokens).cumprod(-1).roll(1, -1)
    equal_prefix[:, 0] = 1
    # a model may mask ids: -inf - -inf would be NaN
    difference = (a.logits - b.logits).abs().masked_fill(a.logits == b.logits, 0)
    return float((difference.amax(-1) * equal_prefix).max())
