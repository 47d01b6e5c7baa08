"""How sure a mean score is."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959964  # two-sided 95 % of a normal distribution


def wilson(successes: float, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion."""
    share, spread = successes / total, Z95 * Z95 / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(scores: NDArray[np.float64], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``scores`` `[seeds, questions]`.

    Questions and seeds are both resampled, so that the luck of the seeds is part of the interval. For differences,
    give the paired differences.
    """
    rng = np.random.default_rng(seed)
    runs, questions = scores.shape
    means = np.empty(resamples)
    for i in range(resamples):
        picked = scores[rng.integers(runs, size=runs)] if runs > 1 else scores
        means[i] = picked[:, rng.integers(questions, size=questions)].mean()
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return low, high


def interval(scores: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the mean of ``scores`` `[seeds, questions]`, all in 0 … 1.

    Wilson for one run of scores that are 0 or 1, and where all are 0 or all are 1 (a bootstrap would be certain then);
    bootstrap otherwise.
    """
    if np.isin(scores, (0.0, 1.0)).all() and (len(scores) == 1 or np.ptp(scores) == 0):
        return wilson(float(scores.mean(0).sum()), scores.shape[1])
    return bootstrap(scores)
