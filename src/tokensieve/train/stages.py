"""Stages of a training run, and the folder in which it keeps its state."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One part of a recipe: optimiser steps, images per step, peak learning rate, weight of the seeing loss."""

    name: str
    steps: int
    batch: int
    rate: float
    seeing: float = 0.0

    def rate_at(self, step: int) -> float:
        """Return the learning rate: a short linear rise, then half a cosine down to a twentieth of the peak."""
        warm = max(1, min(200, self.steps // 10))
        if step < warm:
            return self.rate * (step + 1) / warm
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))
        return self.rate * (0.05 + 0.95 * cosine)


def prepare(output: Path, stages: tuple[Stage, ...], effort: float, resume: bool) -> tuple[Stage, ...]:
    """Make the folder, without an earlier run's state unless it is resumed; return the stages scaled by `effort`."""
    output.mkdir(parents=True, exist_ok=True)
    if not resume:
        for name in ("checkpoint.pt", "metrics.jsonl"):
            (output / name).unlink(missing_ok=True)
    return tuple(replace(stage, steps=max(1, round(stage.steps * effort))) for stage in stages)
