"""Interleaved timing: A B A B in one process, so that drift of the machine affects every candidate equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

ROUNDS = 3


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the quartiles of some numbers."""
        low, median, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75]).tolist()
        return cls(median, low, high)


def interleave(
    calls: Sequence[Callable[[], Any]],
    *,
    around: Sequence[Callable[[], AbstractContextManager[Any]]] | None = None,
    repeats: int = 10,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Time each call in milliseconds, round by round; return one list of ``repeats`` times per call.

    Every second round runs backwards, so that no call always follows the same neighbour. The device is synchronised
    before and after each call.

    Args:
        calls: the calls to time.
        around: for each call, a function that returns its context. Entering and leaving it are not timed.
        repeats, warmup: timed rounds, and untimed rounds before them.
        device: device of the work.
        clock: seconds; ``time.process_time`` excludes other processes on a busy CPU.
    """
    contexts = around or [nullcontext] * len(calls)
    wait = synchroniser(device)
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(-warmup, repeats):
        order = range(len(calls))
        for index in reversed(order) if round_ % 2 else order:
            with contexts[index]():
                wait()
                start = clock()
                calls[index]()
                wait()
                spent = clock() - start
            if round_ >= 0:
                times[index].append(spent * 1e3)
    return times


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Return ``over / under`` round by round: for times, the speedup of the second over the first."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Spread:
    """Return ``first - second`` round by round."""
    return Spread.of([a - b for a, b in zip(first, second, strict=True)])


def synchroniser(device: torch.device | str) -> Callable[[], None]:
    """Return a function that waits for the device's queue; on a CPU it does nothing."""
    if torch.device(device).type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def decode_ms(
    model: Any, inputs: Mapping[str, Tensor], around: Sequence[Callable[[], AbstractContextManager[Any]]], tokens: int
) -> list[list[float]]:
    """Time the gaps between greedily generated tokens in milliseconds, for the whole batch.

    Return one list per context in ``around``. The contexts alternate, :data:`ROUNDS` generations of ``tokens`` gaps
    each.
    """
    gaps: list[list[float]] = [[] for _ in around]
    for _ in range(ROUNDS):
        for context, context_gaps in zip(around, gaps, strict=True):
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
            context_gaps += [(b - a) * 1e3 for a, b in zip(clock.ticks, clock.ticks[1:], strict=False)]
    return gaps


class _Clock(LogitsProcessor):  # type: ignore[misc]
    """Records the time of every step's logits, which stay unchanged."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.ticks: list[float] = []
        self._wait = wait

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._wait()
        self.ticks.append(time.perf_counter())
        return scores
