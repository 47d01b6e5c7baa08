"""Time per generated token, as ``generate`` spends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tokensieve.measure.latency import synchroniser

ROUNDS = 3


def decode_ms(
    model: Any, inputs: Mapping[str, Tensor], around: Sequence[Callable[[], AbstractContextManager[Any]]], tokens: int
) -> list[list[float]]:
    """Milliseconds from each greedily generated token to the next, for the whole batch.

    One list per context in ``around``; the contexts take turns, :data:`ROUNDS` generations of ``tokens`` gaps each.
    """
    gaps: list[list[float]] = [[] for _ in around]
    for _ in range(ROUNDS):
        for context, found in zip(around, gaps, strict=True):
            clock = _Clock(synchroniser(model.device))
            with context():
                model.generate(
                    **inputs,
                    do_sample=False,
                    num_beams=1,
                    min_new_tokens=tokens + 1,
                    max_new_tokens=tokens + 1,
                    logits_processor=LogitsProcessorList([clock]),
                )
            found += [(b - a) * 1e3 for a, b in zip(clock.ticks, clock.ticks[1:], strict=False)]
    return gaps


class _Clock(LogitsProcessor):  # type: ignore[misc]
    """Notes the time of every step's logits and leaves them as they are."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.ticks: list[float] = []
        self._wait = wait

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._wait()
        self.ticks.append(time.perf_counter())
        return scores
