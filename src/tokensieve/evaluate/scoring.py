"""Answers to scores: how right each answer is, and how sure the mean of many is."""

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

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}


def normalise(text: str) -> str:
    """Lower case, single spaces, no articles, no punctuation around words, number words up to ten as digits.

    A text of nothing but articles stays: "A" may name a choice.
    """
    words = [word.strip(".,;:!?\"'`()[]{}") for word in text.lower().split()]
    kept = [word for word in words if word not in _ARTICLES] if set(words) - _ARTICLES else words
    return " ".join(_DIGITS.get(word, word) for word in kept if word)


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals an answer after :func:`normalise`."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 if an answer stands in the prediction as whole words, after :func:`normalise`."""
    text = normalise(prediction)
    found = (re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) for answer in map(normalise, answers) if answer)
    return float(any(found))


def vqa(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy: min(1, agreeing annotators / 3), averaged over leaving out each annotator in turn.

    With n < 4 annotators the divisor is n - 1; with one this is :func:`exact`.
    """
    if len(answers) == 1:
        return exact(prediction, answers)
    agree = [normalise(prediction) == normalise(answer) for answer in answers]
    needed = min(3, len(answers) - 1)
    return sum(min(1.0, (sum(agree) - left_out) / needed) for left_out in agree) / len(agree)


METRICS: dict[str, Metric] = {"exact": exact, "contains": contains, "vqa": vqa}


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


Scores = NDArray[np.float64]
"""`[seeds, questions]`, 0 … 1."""


def score(metric: Metric, samples: Sequence[Sample], runs: Sequence[Sequence[str]]) -> Scores:
    """Scores of the texts that each run answered, `[seeds, questions]`."""
    return np.array([[metric(text, s.answers) for text, s in zip(run, samples, strict=True)] for run in runs])


def by_type(samples: Sequence[Sample], scores: Scores) -> tuple[TypeScore, ...]:
    """Accuracy per question type, in order of appearance; nothing if the data has no types."""
    types = np.array([sample.type for sample in samples])
    found = []
    for name in dict.fromkeys(types.tolist()):
        if name:
            part = scores[:, types == name]
            found.append(TypeScore(name, part.shape[1], float(part.mean()), *interval(part)))
    return tuple(found)


def difference(scores: Scores, others: Scores) -> tuple[float, float, float]:
    """Mean of scores - others', paired by question (and by seed, where both have several), with its 95 % interval."""
    paired = scores - others
    return float(paired.mean()), *bootstrap(paired)
