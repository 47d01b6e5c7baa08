"""The record of what one method costs and saves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tokensieve.measure.latency import Spread


@dataclass(frozen=True)
class Cost:
    """One method on one batch of prompts, next to the unhooked model in the same process.

    Attributes:
        method: the spec, or "replay" for decisions given as they are, or "full" for the unhooked model.
        tokens_before, tokens_after: visual tokens per image, mean over the batch.
        prefill_ms: one forward of the prompts, vision tower and method included, to the logits of the last token.
        prefill_speedup: unhooked time / time with the method, pair by pair.
        method_ms: time with the method - time with a replay of its decisions; ``None`` where no replay does the same
            work (a method that acts inside or before the encoder, a replay itself) and for the unhooked model.
        decode_ms_per_token: each further token of greedy generation, for the whole batch. ``None`` for a
            model that does not generate.
        flops: of the prefill.
        flops_ratio: flops / flops of the unhooked prefill.
        peak_activation_bytes: of the prefill, the KV cache included.
        kv_bytes: of the cache after the prefill; ``None`` for a model that does not generate.
        break_even_tokens: generated tokens after which the method has paid for itself: 0 where its prefill is already
            as fast, ``None`` where it never does.
    """

    method: str
    tokens_before: float
    tokens_after: float
    prefill_ms: Spread
    prefill_speedup: Spread
    method_ms: Spread | None
    decode_ms_per_token: Spread | None
    flops: int
    flops_ratio: float
    peak_activation_bytes: int
    kv_bytes: int | None
    break_even_tokens: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; a :class:`Spread` becomes ``{"median", "low", "high"}``."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cost:
        """Inverse of :meth:`to_json`."""
        spreads = {key: Spread(**value) for key, value in data.items() if isinstance(value, dict)}
        return cls(**{**data, **spreads})


def break_even(extra_prefill_ms: float, saved_ms_per_token: float) -> float | None:
    """Generated tokens that earn back what the prefill costs more: 0 if it costs no more, ``None`` if never."""
    if extra_prefill_ms <= 0:
        return 0.0
    return extra_prefill_ms / saved_ms_per_token if saved_ms_per_token > 0 else None
