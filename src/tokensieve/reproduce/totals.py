"""From the scores of questions to the number that a paper prints, with its 95 % interval.

A published number is a mean of scores (accuracy), a mean over categories of a ratio (POPE's F1), a sum over categories
of a mean over pairs of questions (MME), or a share of groups that are right as a whole (MMBench). All are linearised:
every unit (a question, a pair, a group) gets a value whose mean is the number and whose variance is the number's. The
intervals of :mod:`tokensieve.evaluate.intervals` then serve every number, single and paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tokensieve.errors import DataError
from tokensieve.evaluate import Question
from tokensieve.evaluate.intervals import Clusters, Floats, Scores
from tokensieve.reproduce.recipes import Total

Units = tuple[Floats, Clusters]
"""Values `[seeds, units]`, and for each unit the number of its image `[units]`."""

CIRCULAR = 1_000_000  # MMBench numbers the rotations of question i as i, 1,000,000 + i, 2,000,000 + i…


def units(kind: Total, scores: Scores, questions: Sequence[Question], groups: Mapping[str, str]) -> Units:
    """Return the linearised values of a number in 0 … 1; their mean is the number.

    Args:
        scores: `[seeds, questions]`.
        groups: by question id, the group that a question is scored with.

    Raises:
        DataError: a group of MME that is no pair.
    """
    return _TOTALS[kind](scores, questions, groups)


def _mean(scores: Scores, questions: Sequence[Question], groups: Mapping[str, str]) -> Units:
    return scores, _clusters(questions)


def _f1(scores: Scores, questions: Sequence[Question], groups: Mapping[str, str]) -> Units:
    """Average the F1 of each category; "yes" is the positive answer."""
    positive = np.array([float(bool(question.positive)) for question in questions])
    answered_yes = np.where(positive == 1, scores, 1 - scores)
    categories = [question.type for question in questions]
    return _linearised(2 * answered_yes * positive, answered_yes + positive, categories), _clusters(questions)


def _pairs(scores: Scores, questions: Sequence[Question], groups: Mapping[str, str]) -> Units:
    """Average (accuracy + share of images with both answers right) / 2 of each category."""
    members = _members(questions, groups)
    for group, places in members.items():
        if len(places) != 2:
            raise DataError(f"MME has two questions about each image; {group!r} has {len(places)}")
    pairs = np.stack([scores[:, places] for places in members.values()], axis=1)
    values = (pairs.mean(-1) + pairs.min(-1)) / 2
    firsts = [questions[places[0]] for places in members.values()]
    linearised = _linearised(values, np.ones_like(values), [question.type for question in firsts])
    return linearised, _clusters(firsts)


def _circular(scores: Scores, questions: Sequence[Question], groups: Mapping[str, str]) -> Units:
    """Count a question as right if it is right with its options in every rotation."""
    try:
        numbers = {name: str(int(group) % CIRCULAR) for name, group in groups.items()}
    except ValueError:
        raise DataError("MMBench numbers its questions in the column 'index'") from None
    members = _members(questions, numbers)
    values = np.stack([scores[:, places].min(-1) for places in members.values()], axis=1)
    return values, _clusters([questions[places[0]] for places in members.values()])


_TOTALS: dict[Total, Callable[[Scores, Sequence[Question], Mapping[str, str]], Units]] = {
    "mean": _mean,
    "f1": _f1,
    "pairs": _pairs,
    "circular": _circular,
}


def _linearised(parts: Floats, wholes: Floats, categories: Sequence[str]) -> Floats:
    """Return values whose mean is the mean over categories of sum(parts) / sum(wholes), `[seeds, units]`."""
    names = list(dict.fromkeys(categories))
    deviations, ratios = np.zeros_like(parts), []
    for name in names:
        chosen = np.array([category == name for category in categories])
        total = wholes[:, chosen].sum(-1, keepdims=True)
        ratio = parts[:, chosen].sum(-1, keepdims=True) / np.maximum(total, 1e-12)
        residuals = parts[:, chosen] - ratio * wholes[:, chosen]
        deviations[:, chosen] = residuals * len(categories) / (len(names) * np.maximum(total, 1e-12))
        ratios.append(ratio)
    return np.asarray(np.mean(ratios, axis=0) + deviations)


def _members(questions: Sequence[Question], groups: Mapping[str, str]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        members.setdefault(groups[question.id], []).append(place)
    return members


def _clusters(questions: Sequence[Question]) -> Clusters:
    return np.array([question.cluster for question in questions])
