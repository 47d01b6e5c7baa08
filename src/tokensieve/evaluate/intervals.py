"""95 % intervals of accuracies and of paired differences, for questions that share images and for graded scores.

One rule serves every case. A score interval (Wilson's for a mean, Tango's for a paired difference) is computed at the
effective number of questions: the number of independent questions with a right or wrong answer that would give the
variance seen between images. Score intervals keep a width where no question differs; a bootstrap has none there.

Tango's was chosen over Newcombe's (1998, method 10) by exact coverage: at 30 … 1000 questions of which 0.5 … 10 % are
lost, a nominal 95 % of Tango's is at least 93.3 %, of Newcombe's at least 91.2 %. ``tests/evaluate/test_intervals.py``
measures it, with repeated images and graded scores too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Scores = Floats
"""`[seeds, questions]`, 0 … 1."""
Clusters = NDArray[np.int64]
"""`[questions]`: the number of each question's image."""

Z95 = 1.959964  # two-sided 95 % of a normal distribution


@dataclass(frozen=True)
class PairedDifference:
    """The mean score of one row minus that of another on the same questions.

    Attributes:
        difference, low, high: the mean with its 95 % interval, each in -1 … 1.
        p: McNemar's exact p-value for equal scores, with whole images exchanged where images repeat. ``None`` for
            graded scores and for several seeds.
        samples, clusters: questions, and images that they are about.
        interval: the method of the interval.
    """

    difference: float
    low: float
    high: float
    p: float | None
    samples: int
    clusters: int
    interval: str

    @property
    def told_apart(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """Return the difference in points: "-3.2 (-5.5 to -1.2)"."""
        return in_points(self.difference, self.low, self.high, sign="+")

    def __repr__(self) -> str:
        p = "" if self.p is None else f", p = {self.p:.2g}"
        return f"PairedDifference({self} points{p}, {self.samples} questions, {self.clusters} images)"


def in_points(value: float, low: float, high: float, *, sign: str = "") -> str:
    """Return a share, or with ``sign="+"`` a signed difference, in points with its interval: "-3.2 (-5.5 to -1.2)"."""
    mean, start, end = (f"{100 * share:{sign}.1f}" for share in (value, low, high))
    return f"{mean} ({start} to {end})"


def wilson(successes: float, total: float) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927). The counts may be fractions."""
    share, spread = successes / total, Z95 * Z95 / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # the ends are exact where rounding would leave 1e-17
    return max(0.0, centre - half) if share > 0 else 0.0, min(1.0, centre + half) if share < 1 else 1.0


def tango(gained: ArrayLike, lost: ArrayLike, total: ArrayLike, z: float = Z95) -> tuple[Floats, Floats]:
    """Return the 95 % score interval of a difference of paired proportions (Tango, Statistics in Medicine 17, 1998).

    With b questions gained, c lost and n in all, the interval holds each D with ``|T(D)| <= 1.96``:

    .. code-block:: text

        T(D) = (b - c - n D) / sqrt(n (2 q + D (1 - D)))
        q    = (sqrt(B² - 8 n C) - B) / (4 n),   B = (2n - b + c) D - b - c,   C = -c D (1 - D)

    q is the share of lost questions that is most likely if D is the true difference.

    Args:
        gained, lost, total: counts, which may be fractions; arrays give arrays.
        z: the normal quantile of another confidence than 95 %.
    """
    b, c, n = np.broadcast_arrays(*(np.asarray(count, dtype=np.float64) for count in (gained, lost, total)))

    def statistic(d: Floats) -> Floats:
        linear, constant = (2 * n - b + c) * d - b - c, -c * d * (1 - d)
        q = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0)) - linear) / (4 * n)
        variance = np.maximum(n * (2 * q + d * (1 - d)), 1e-300)
        return np.asarray((b - c - n * d) / np.sqrt(variance))

    observed = (b - c) / n

    def bound(end: float) -> Floats:
        """Bisect between the observed difference, inside the interval, and an end of the scale."""
        inside, outside = observed, np.full_like(observed, end)
        for _ in range(60):
            middle = (inside + outside) / 2
            within = np.abs(statistic(middle)) <= z
            inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
        return np.asarray(outside)

    return bound(-1.0), bound(1.0)


def interval(scores: Scores, clusters: Clusters) -> tuple[float, float]:
    """Return the 95 % interval of the mean of scores: Wilson's, at the effective number of questions."""
    return ratio(scores, np.ones_like(scores), clusters)[1:]


def ratio(parts: Floats, wholes: Floats, clusters: Clusters) -> tuple[float, float, float]:
    """Return the sum of ``parts`` / the sum of ``wholes``, in 0 … 1, and its 95 % interval.

    The interval is Wilson's, at the effective number of wholes; the variance is that of ``part - ratio · whole`` (the
    linearised ratio). A ratio of nothing is 0, and its interval is 0 … 1.

    Args:
        parts, wholes: `[seeds, questions]`.
    """
    total = float(wholes.mean(0).sum())
    if total == 0:
        return 0.0, 0.0, 1.0
    value = float(parts.mean(0).sum()) / total
    residuals = parts - value * wholes
    # independent right-or-wrong answers with this mean have variance value (1 - value) each
    binary = total * value * (1 - value)
    effect = float(_design_effect(residuals.mean(0), clusters, binary, between_seeds(residuals)))
    return value, *wilson(value * total / effect, total / effect)


def paired_difference(scores: Scores, others: Scores, clusters: Clusters) -> PairedDifference:
    """Return the mean of ``scores`` minus ``others``, paired by question; each may have several seeds."""
    paired = scores.mean(0) - others.mean(0)
    counts = effective_counts(paired, clusters, between_seeds(scores) + between_seeds(others))
    low, high = tango(*counts)
    single = len(scores) == len(others) == 1
    right_or_wrong = bool(np.isin(scores, (0, 1)).all() and np.isin(others, (0, 1)).all())
    images = len(np.unique(clusters))
    plain = single and right_or_wrong and images == paired.size
    return PairedDifference(
        difference=float(paired.mean()),
        low=float(low),
        high=float(high),
        p=sign_flip_p(paired.astype(int), clusters) if single and right_or_wrong else None,
        samples=paired.size,
        clusters=images,
        interval="Tango's score interval" if plain else "Tango's score interval at the effective number of questions",
    )


def effective_counts(paired: Floats, clusters: Clusters, seeds: Any = 0.0) -> tuple[Any, Any, Any]:
    """Return the gained, lost and total questions that :func:`tango` needs, divided by the design effect.

    Args:
        paired: differences by question, `[..., questions]`.
        seeds: further variance of their mean, see :func:`between_seeds`, `[...]`.
    """
    gained, lost = np.maximum(paired, 0).sum(-1), np.maximum(-paired, 0).sum(-1)
    total = paired.shape[-1]
    # differences of right-or-wrong answers with these sums have this variance
    residuals = paired - paired.mean(-1, keepdims=True)
    effect = _design_effect(residuals, clusters, gained + lost - (gained - lost) ** 2 / total, seeds)
    return gained / effect, lost / effect, total / effect


def _design_effect(residuals: Floats, clusters: Clusters, binary: Any, seeds: Any) -> Any:
    """Return the variance of a sum over questions / ``binary``, its variance with independent right-or-wrong answers.

    Questions about one image vary together, so the variance is that of the images' sums (Kish 1965). Few questions that
    differ say little about how they cluster: the estimate includes one more, whose whole image differs with it.

    Args:
        residuals: deviations of the questions from the mean, `[..., questions]`.
        seeds: further variance of the mean over questions, `[...]`.
    """
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    sums = np.add.reduceat(residuals[..., order], starts, axis=-1)
    whole_image = (sizes**2).sum() / len(order)
    effect = ((sums**2).sum(-1) + whole_image) / (binary + 1)
    if whole_image > 1:
        # few images say little about their variance; assume at most that of images whose questions are one question
        wider = np.minimum(effect * (_student95(len(sizes) - 1) / Z95) ** 2, whole_image)
        effect = np.maximum(effect, wider)
    return effect + seeds * len(order) ** 2 / (binary + 1)


def _student95(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t (Cornish-Fisher expansion, right to 0.003)."""
    if freedom < 5:
        return (math.inf, 12.7062, 4.3027, 3.1824, 2.7764)[freedom]
    z = Z95
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return float(sum(term / freedom**power for power, term in enumerate(terms)))


def between_seeds(scores: Floats) -> Any:
    """Return the variance of the mean that comes from draws shared by all questions of a seed.

    The means of the seeds vary by shared draws and by the draws for each question. Only the first part is returned: the
    second varies between images, too, and is counted there. Few seeds show little of it: with five seeds whose shared
    draws cause most of the variance, a nominal 95 % is about 90 %.

    Args:
        scores: `[..., seeds, questions]`.
    """
    seeds, questions = scores.shape[-2:]
    if seeds == 1:
        return 0.0
    means = scores.mean(-1).var(-1, ddof=1) / seeds
    separate = scores.var(-2, ddof=1).mean(-1) / (seeds * questions)
    return np.maximum(means - separate, 0)


def sign_flip_p(paired: NDArray[np.int64], clusters: Clusters) -> float:
    """Return the two-sided p-value of the exact test that exchanges the two rows' answers image by image.

    Every exchange is equally likely if the rows are equal. With one question per image this is McNemar's exact test:
    the binomial test of the questions that only one of the two rows has right.

    Args:
        paired: -1, 0 or 1 by question, `[questions]`.
    """
    sums = np.abs(np.bincount(np.unique(clusters, return_inverse=True)[1], weights=paired)).astype(int)
    # chances[i]: share of the exchanges whose sum is i - reach
    chances, reach = np.ones(1), 0
    for step in sums[sums > 0].tolist():
        wider = np.zeros(len(chances) + 2 * step)
        wider[: len(chances)] += chances / 2
        wider[2 * step :] += chances / 2
        chances, reach = wider, reach + step
    distance = np.abs(np.arange(-reach, reach + 1))
    return float(min(1.0, chances[distance >= abs(int(paired.sum()))].sum()))
