"""From answers to accuracies with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.intervals import bootstrap, interval
from tokensieve.evaluate.metrics import Metric
from tokensieve.evaluate.results import TypeScore

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
