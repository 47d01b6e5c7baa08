"""Metrics: the score of an answer, 0 … 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]
"""(prediction, accepted answers) -> 0 … 1."""

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}


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
