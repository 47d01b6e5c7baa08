"""The drop of accuracy of a configuration, paired by question with the unreduced model, and its one-sided bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from tokensieve.evaluate.intervals import Clusters, Floats, effective_counts, tango

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(CONFIDENCE)  # one-sided
POWER = NormalDist().inv_cdf(0.8)
# Counts are whole numbers and skewed: without this share of one more lost question a one-sided 95 % bound misses up to
# 7 of 100 true drops where few answers change, with it at most 5 (exact enumeration, tests/tune/test_statistics.py).
CORRECTION = 0.25


@dataclass(frozen=True)
class Drop:
    """Accuracy of the unreduced model minus that of a configuration, on the same questions.

    Attributes:
        mean: the difference, in -1 … 1; negative where the configuration is better.
        high: its upper bound: in 95 of 100 samples of questions the true drop lies below.
        lost, gained: summed scores that only the unreduced model, or only the configuration, has.
        questions: answered by both.
        accuracy: of the configuration.
    """

    mean: float
    high: float
    lost: float
    gained: float
    questions: int
    accuracy: float


def drop_of(full: Floats, reduced: Floats, clusters: Clusters) -> Drop:
    """Return the drop over the questions that both have answered.

    The bound is that of Tango's score interval at the effective number of questions (see
    :mod:`tokensieve.evaluate.intervals`), one-sided at 95 %, with :data:`CORRECTION` of a question more lost.

    Args:
        full, reduced: scores `[questions]`, NaN where there is none.
        clusters: number of each question's image `[questions]`.
    """
    common = np.isfinite(full) & np.isfinite(reduced)
    paired = (reduced - full)[common]
    gained, lost, total = effective_counts(paired, clusters[common])
    low, _ = tango(gained, lost + CORRECTION, total, z=Z)
    return Drop(
        mean=0.0 - float(paired.mean()),  # not -0.0, which prints as -0.00%
        high=float(-low),
        lost=float(np.maximum(-paired, 0).sum()),
        gained=float(np.maximum(paired, 0).sum()),
        questions=int(common.sum()),
        accuracy=float(reduced[common].mean()),
    )


def chance(full: Floats, reduced: Floats, held_out: int, max_drop: float) -> float:
    """Return the probability that so many new questions will prove the bound, judged by the questions seen so far.

    It is normal, with one question lost and one gained in addition: where no answer differs yet, one may differ next.

    Args:
        full, reduced: scores `[questions]`, NaN where there is none.
    """
    mean, variance, count = _moments(full, reduced)
    spread = math.sqrt(variance * (1 / count + 1 / held_out))
    return NormalDist().cdf((max_drop - Z * math.sqrt(variance / held_out) - mean) / spread)


def surely_worse(full: Floats, reduced: Floats, max_drop: float) -> bool:
    """Return whether the drop is above the bound with 95 % confidence, judged by the questions seen so far."""
    mean, variance, count = _moments(full, reduced)
    return mean - Z * math.sqrt(variance / count) > max_drop


def fewest(max_drop: float) -> int:
    """Return the number of questions that prove the bound where no answer differs from the unreduced model's."""
    # the bound d of n questions solves (n d - c)² = z² n d (1 - d), with the correction c for the lost ones
    spread = Z * math.sqrt(1 - max_drop)
    expected = ((spread + math.sqrt(spread**2 + 4 * CORRECTION)) / 2) ** 2  # n d
    return math.ceil(expected / max_drop)


def needed(drop: Drop, max_drop: float) -> int | None:
    """Return the number of questions that prove the bound four times out of five, if drop and changes stay as they are.

    ``None``: no number does, because the drop itself exceeds the bound.
    """
    if drop.mean >= max_drop:
        return None
    # the interval, which counts repeated images, narrows with the root of the number
    narrower = (drop.high - drop.mean) / (max_drop - drop.mean) * (Z + POWER) / Z
    return math.ceil(drop.questions * narrower**2)


def _moments(full: Floats, reduced: Floats) -> tuple[float, float, int]:
    """Return mean and variance of the drop per question and the number of questions, with the two additional ones."""
    paired = (full - reduced)[np.isfinite(full) & np.isfinite(reduced)]
    widened = np.concatenate([paired, [1.0, -1.0]])
    return float(widened.mean()), float(widened.var(ddof=1)), len(widened)
