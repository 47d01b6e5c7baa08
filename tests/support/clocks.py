"""Clocks that no machine drives: tests time nothing for real."""

from __future__ import annotations

from tokensieve.measure import CpuReading


class Clock:
    """Seconds that advance only when a test spends them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


class Ticking(Clock):
    """Advances by one second at every look: all calls take equally long."""

    def __call__(self) -> float:
        self.spend(1)
        return self.now


class Cpu:
    """Readings one second apart, in which this process had one core and others had so many."""

    def __init__(self, others: float = 0.0) -> None:
        self.others, self.seconds = others, 0

    def __call__(self) -> CpuReading:
        self.seconds += 1
        return CpuReading(self.seconds, self.seconds, self.seconds * (1 + self.others))
