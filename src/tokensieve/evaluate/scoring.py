"""Answers to scores, and scores to accuracies with 95 % intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.results import TypeScore

Metric = Callable[[str, Sequence[str]], float]
"""(prediction, accepted answers) -> 0 … 1."""
Scores = NDArray[np.float64]
"""`[seeds, questions]`, 0 … 1."""

Z95 = 1.959964  # two-sided 95 % of a normal distribution
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}


# -- one answer -----------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Return lower case, single spaces, no articles, no punctuation around words, number words up to ten as digits.

    A text of articles only stays as it is: "A" may name a choice.
    """
    words = [word.strip(".,;:!?\"'`()[]{}") for word in text.lower().split()]
    kept = [word for word in words if word not in _ARTICLES] if set(words) - _ARTICLES else words
    return " ".join(_DIGITS.get(word, word) for word in kept if word)


def exact(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction equals an answer after :func:`normalise`."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def contains(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if an answer occurs in the prediction as whole words, after :func:`normalise`."""
    text = normalise(prediction)
    matches = (re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) for answer in map(normalise, answers) if answer)
    return float(any(matches))


def vqa(prediction: str, answers: Sequence[str]) -> float:
    """Return VQA accuracy: min(1, agreeing annotators / 3), averaged over leaving out each annotator in turn.

    With n < 4 annotators the divisor is n - 1; with one this is :func:`exact`.
    """
    if len(answers) == 1:
        return exact(prediction, answers)
    agrees = [normalise(prediction) == normalise(answer) for answer in answers]
    needed = min(3, len(answers) - 1)
    return sum(min(1.0, (sum(agrees) - left_out) / needed) for left_out in agrees) / len(agrees)


METRICS: dict[str, Metric] = {"exact": exact, "contains": contains, "vqa": vqa}


# -- many answers ---------------------------------------------------------------------------------------------------


def score(metric: Metric, samples: Sequence[Sample], runs: Sequence[Sequence[str]]) -> Scores:
    """Score the answers of each run, `[seeds, questions]`."""
    return np.array([[metric(text, s.answers) for text, s in zip(run, samples, strict=True)] for run in runs])


def by_type(samples: Sequence[Sample], scores: Scores) -> tuple[TypeScore, ...]:
    """Return the accuracy per question type, in order of appearance; empty if the data has no types."""
    types = np.array([sample.type for sample in samples])
    type_scores = []
    for name in dict.fromkeys(types.tolist()):
        if name:
            part = scores[:, types == name]
            type_scores.append(TypeScore(name, part.shape[1], float(part.mean()), *interval(part)))
    return tuple(type_scores)


def difference(scores: Scores, others: Scores) -> tuple[float, float, float]:
    """Return the mean of scores - others', paired by question (and by seed, if both have several), and its interval."""
    paired = scores - others
    return float(paired.mean()), *bootstrap(paired)


def wilson(successes: float, total: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion."""
    share, spread = successes / total, Z95 * Z95 / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(scores: Scores, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of ``scores`` `[seeds, questions]`.

    Questions and seeds are both resampled, so that the variance of the seeds is part of the interval. For a difference,
    pass the paired differences.
    """
    rng = np.random.default_rng(seed)
    runs, questions = scores.shape
    means = np.empty(resamples)
    for i in range(resamples):
        resampled = scores[rng.integers(runs, size=runs)] if runs > 1 else scores
        means[i] = resampled[:, rng.integers(questions, size=questions)].mean()
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return low, high


def interval(scores: Scores) -> tuple[float, float]:
    """Return the 95 % interval of the mean of ``scores`` `[seeds, questions]`, all in 0 … 1.

    Wilson's for one run of scores that are 0 or 1, and where all are 0 or all are 1 (a bootstrap would have no width);
    bootstrap otherwise.
    """
    if np.isin(scores, (0.0, 1.0)).all() and (len(scores) == 1 or np.ptp(scores) == 0):
        return wilson(float(scores.mean(0).sum()), scores.shape[1])
    return bootstrap(scores)
