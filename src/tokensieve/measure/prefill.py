"""What each method costs and saves on one batch of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokensieve.measure.latency import Spread
from tokensieve.methods import Method
from tokensieve.reduction import Reduction

Decisions = Sequence[Sequence[Reduction]]


@dataclass(frozen=True)
class Cost:
    """One method on one batch of prompts, next to the unhooked model in the same process.

    Attributes:
        method: the spec, or "replay" for decisions given as they are, or "full" for the unhooked model.
        tokens_before, tokens_after: visual tokens per image, mean over the batch.
        prefill_ms: one forward of the prompts, vision tower and method included, to the logits of the last token.
        prefill_speedup: unhooked time / time with the method, pair by pair.
        method_ms: time with the method - time with a replay of its decisions; ``None`` where no replay does the same
            work (a method that acts inside or before the encoder) and for the unhooked model.
        decode_ms_per_token: each further token of greedy generation, for the whole batch.
        flops: of the prefill.
        flops_ratio: flops / flops of the unhooked prefill.
        peak_activation_bytes: of the prefill, the KV cache included.
        kv_bytes: of the cache after the prefill.
        break_even_tokens: generated tokens after which the method has paid for itself: 0 where its prefill is already
            as fast, ``None`` where it never does.
    """

    method: str
    tokens_before: float
    tokens_after: float
    prefill_ms: Spread
    prefill_speedup: Spread
    method_ms: Spread | None
    decode_ms_per_token: Spread
    flops: int
    flops_ratio: float
    peak_activation_bytes: int
    kv_bytes: int
    break_even_tokens: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; a :class:`Spread` becomes ``{"median", "low", "high"}``."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cost:
        """Inverse of :meth:`to_json`."""
        raise NotImplementedError


def measure_costs(
    model: Any,
    inputs: Mapping[str, Tensor],
    methods: Sequence[str | Method | Sequence[Method] | Decisions],
    *,
    processor: Any = None,
    repeats: int = 10,
    warmup: int = 2,
    decode_tokens: int = 8,
) -> list[Cost]:
    """Measure the unhooked model (first in the list, as "full") and then each method, in pairs.

    Args:
        model: a vision-language model with nothing attached.
        inputs: what the processor returned for one batch of prompts (left-padded), on the model's device.
        methods: specs, methods, lists of methods (stages in order), or decisions to replay, as for ``attach``.
        processor: for text-informed methods, as for ``attach``.
        repeats, warmup: rounds timed and rounds thrown away, of full, method and replay in turn.
        decode_tokens: tokens generated to time decoding.

    Raises:
        ValueError: unknown method or parameter, or a method that this model cannot run.
    """
    raise NotImplementedError
