"""How right an answer is, and how sure the mean is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Metric = Callable[[str, Sequence[str]], float]

METRICS: dict[str, Metric] = {}


def wilson(successes: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion."""
    raise NotImplementedError


def bootstrap(scores: NDArray[np.float64], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``scores`` `[seeds, questions]`, both resampled."""
    raise NotImplementedError
