"""Interleaved timing: A B B A in one process, so that drift of the machine affects every candidate equally."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tokensieve.loading import devices_of

Clock: TypeAlias = Callable[[], float]
"""Returns seconds."""

Context: TypeAlias = Callable[[], AbstractContextManager[Any]]
"""Returns the context of a call, such as a method that is attached for it."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the quartiles of some numbers."""
        low, median, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75]).tolist()
        return cls(median, low, high)

    def __str__(self) -> str:
        """Return the median and the quartiles, "26 (25–28)"; the side of 1 shows in ratios: "1.1 (1.02–1.2)"."""

        def shown(value: float) -> str:
            text = two_digits(value)
            return ratio_digits(value) if float(text) == 1 != value else text

        return f"{shown(self.median)} ({shown(self.low)}–{shown(self.high)})"


def two_digits(value: float) -> str:
    """Return a number with two significant digits and without an exponent: 804 as "800", 0.0456 as "0.046"."""
    rounded = float(f"{value:.1e}")
    decimals = 0 if rounded == 0 else max(0, 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{decimals}f}"


def ratio_digits(value: float) -> str:
    """Return a ratio with two decimals, or with up to four where fewer would hide its side of 1."""
    texts = [f"{value:.{decimals}f}" for decimals in (2, 3, 4)]
    return next((text for text in texts if float(text) != 1), texts[0])


def interleave(
    calls: Sequence[Callable[[], Any]],
    *,
    around: Sequence[Context] | None = None,
    repeats: int = 10,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Time each call in milliseconds, round by round; return one list of ``repeats`` times per call.

    The device is synchronised before and after each call. The order is that of :func:`in_rounds`.

    Args:
        calls: the calls to time.
        around: for each call, a function that returns its context. Entering and leaving it are not timed.
        repeats, warmup: timed rounds, and untimed rounds before them.
        device: device of the work.
        clock: seconds; ``time.process_time`` excludes other processes on a busy CPU.
    """
    contexts = around or [nullcontext] * len(calls)
    stopwatches = [stopwatch(call, c, devices=[device], clock=clock) for call, c in zip(calls, contexts, strict=True)]
    return in_rounds(stopwatches, repeats=repeats, warmup=warmup)


def in_rounds(stopwatches: Sequence[Callable[[], float]], *, repeats: int, warmup: int) -> list[list[float]]:
    """Take each time once per round; return one list of ``repeats`` times per stopwatch.

    Every second round runs backwards: no candidate always follows the same neighbour, and a steady drift of the machine
    favours no place in the order.
    """
    times: list[list[float]] = [[] for _ in stopwatches]
    for round_ in range(-warmup, repeats):
        order = range(len(stopwatches))
        for index in reversed(order) if round_ % 2 else order:
            spent = stopwatches[index]()
            if round_ >= 0:
                times[index].append(spent)
    return times


def stopwatch(
    call: Callable[[], Any],
    around: Context = nullcontext,
    *,
    devices: Sequence[torch.device | str] = (),
    clock: Clock = time.perf_counter,
) -> Callable[[], float]:
    """Return a function that makes the call inside its context and returns the milliseconds of the call alone."""
    wait = synchroniser(devices)

    def measure() -> float:
        with around():
            wait()
            start = clock()
            call()
            wait()
            return (clock() - start) * 1e3

    return measure


def decode_stopwatch(
    model: Any,
    inputs: Mapping[str, Tensor],
    around: Context = nullcontext,
    *,
    tokens: int,
    clock: Clock = time.perf_counter,
) -> Callable[[], float]:
    """Return a function that generates greedily and returns the milliseconds per token after the first one.

    Its time is the mean over ``tokens`` steps, for the whole batch.
    """
    wait = synchroniser(devices_of(model))

    def measure() -> float:
        ticks = _Ticks(wait, clock)
        with around():
            model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                min_new_tokens=tokens + 1,
                max_new_tokens=tokens + 1,
                logits_processor=LogitsProcessorList([ticks]),
            )
        return (ticks.seconds[-1] - ticks.seconds[0]) / tokens * 1e3

    return measure


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Return ``over / under`` round by round: for times, the speedup of the second over the first."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


def synchroniser(devices: Sequence[torch.device | str]) -> Callable[[], None]:
    """Return a function that waits for the queues of the devices; a CPU has none."""
    queues = [device for device in devices if torch.device(device).type == "cuda"]

    def wait() -> None:
        for device in queues:
            torch.cuda.synchronize(device)

    return wait


class _Ticks(LogitsProcessor):  # type: ignore[misc]
    """Records the time of every step's logits, which stay unchanged."""

    def __init__(self, wait: Callable[[], None], clock: Clock) -> None:
        self.seconds: list[float] = []
        self._wait, self._clock = wait, clock

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._wait()
        self.seconds.append(self._clock())
        return scores
