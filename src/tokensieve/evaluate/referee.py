"""The referee: tests of every row against the rows that it must beat, on recorded scores. No model is needed.

``referee(Results.load("runs/old/results.json"))`` examines an old comparison again. Five questions are asked of a row:

1. Does it beat full, random, downsample and the runner-up? McNemar's exact test, paired, corrected by Holm.
2. Does it hold where the image is needed (the blind model is wrong), and where downsampling fails (VTC-Bench's hard
   group)? Groups are chosen by another row's answers, so that row itself has 0 % or 100 % there by construction.
3. Does it beat the baseline that takes as much time?
4. Does its mean hide a loss on a guarded question type: places, and text to read?
5. Do seeds change it?
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from tokensieve.evaluate.intervals import (
    Clusters,
    Scores,
    between_seeds,
    effective_counts,
    interval,
    paired_difference,
    sign_flip_p,
    tango,
)
from tokensieve.evaluate.kinds import BASELINES, REDUCING, Kind, baseline_methods, kind_of, plain_name
from tokensieve.evaluate.results import Results
from tokensieve.evaluate.verdict import Against, Group, GroupScore, Guard, Reference, Verdict

SIMILAR = 1.2  # rows are compared if one has at most so many times the tokens of the other
FEW = 30  # a group of fewer questions decides nothing
HIDDEN_LOSS = 0.05  # a guarded type may lose so much while the mean loses less
FALSE_ALARMS = 0.05  # chance that a row without any loss is flagged, over all its guarded types
SAME_TIME = 1.25  # prefill times further apart are not called equal
SPLITTERS = ("downsample", "pool")  # pool makes the hard group where no row resizes images
GUARDED = re.compile(
    r"where|point|box|place|posit|locat|ground|refer|region|corner|read|text|ocr|sign|word|letter|doc|chart", re.I
)
GUARDED_METRICS = ("anls",)  # every question is about text to read

Chosen = NDArray[np.bool_]
"""`[questions]`: the questions of a group."""


def similar(tokens: float, others: float, factor: float = SIMILAR) -> bool:
    """Return whether two numbers of tokens are at most a factor apart."""
    return max(tokens, others) <= factor * max(min(tokens, others), 1e-9)


def exact_p(scores: Scores, others: Scores, clusters: Clusters) -> float | None:
    """Return McNemar's exact two-sided p-value of two rows; ``None`` for graded scores.

    Whole images are exchanged where images repeat. With s seeds, seed i is tested against seed i, which gives s
    p-values. Their k-th smallest times s / k, with k = ceil(s / 2), is a p-value whatever their dependence (Rüger
    1978).

    Args:
        scores, others: `[seeds, questions]`. A row with fewer seeds repeats them.
    """
    if not (np.isin(scores, (0, 1)).all() and np.isin(others, (0, 1)).all()):
        return None
    seeds = max(len(scores), len(others))
    pairs = [scores[i % len(scores)] - others[i % len(others)] for i in range(seeds)]
    p_values = sorted(sign_flip_p(paired.astype(int), clusters) for paired in pairs)
    k = math.ceil(seeds / 2)
    return min(1.0, p_values[k - 1] * seeds / k)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's corrected p-values: below 0.05 in any of them with at most 5 % chance if no row differs.

    The i-th smallest of m is multiplied by m - i + 1, is never below the one before it, and is at most 1.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        corrected[place] = largest
    return corrected


def jaccard(first: AbstractSet[int], second: AbstractSet[int]) -> float:
    """Return the share of the places in both sets among those in any; 1 for two empty sets."""
    union = first | second
    return len(first & second) / len(union) if union else 1.0


def chance_overlap(share: float) -> float:
    """Return the Jaccard index that two independent draws of this share of many tokens have: s² / (2 s - s²)."""
    return share / (2 - share) if share else 1.0


def referee(results: Results) -> Results:
    """Return the results with a :class:`Verdict` in every row. The overlap of kept places stays as it was."""
    court = _Court(results)
    verdicts = [court.verdict(number) for number in range(len(results.rows))]
    for reference in ("full", "random", "downsample", "runner-up", "equal time"):
        verdicts = _corrected(verdicts, reference)
    rows = [replace(row, referee=verdict) for row, verdict in zip(results.rows, verdicts, strict=True)]
    return replace(results, rows=tuple(rows))


def _corrected(verdicts: Sequence[Verdict], reference: Reference) -> list[Verdict]:
    """Correct the p-values of all rows that are compared with one reference."""
    p_values = [against.p for v in verdicts if (against := v.to(reference)) is not None and against.p is not None]
    corrected = iter(holm(p_values))

    def correct(against: Against) -> Against:
        if against.reference != reference or against.p is None:
            return against
        return replace(against, p_holm=next(corrected), tests=len(p_values))

    return [replace(verdict, against=tuple(map(correct, verdict.against))) for verdict in verdicts]


class _Court:
    """The rows of a comparison with their kinds and scores."""

    def __init__(self, results: Results) -> None:
        baselines = baseline_methods()
        self.results, self.rows = results, results.rows
        self.kinds: list[Kind] = [kind_of(row.method, baselines) for row in results.rows]
        self.scores = [np.array(scores, dtype=float) for scores in results.scores]
        self.clusters = np.array([question.cluster for question in results.questions])
        self.full, self.blind = self._first("full"), self._first("blind")

    def verdict(self, number: int) -> Verdict:
        means = self.scores[number].mean(1)
        seeds, row = len(means), self.rows[number]
        reducing = self.kinds[number] in REDUCING
        return Verdict(
            seeds=seeds,
            seed_low=float(means.min()) if seeds > 1 else None,
            seed_high=float(means.max()) if seeds > 1 else None,
            against=tuple(self._comparisons(number)) if reducing else (),
            groups=tuple(self._groups(number)),
            guards=tuple(self._guards(number)) if reducing else (),
            overlap=None if row.referee is None else row.referee.overlap,
        )

    # -- against other rows ---------------------------------------------------------------------------------------

    def _comparisons(self, number: int) -> Iterator[Against]:
        others: dict[Reference, int | None] = {
            "full": self.full,
            "random": self._nearest(number, lambda i: self.kinds[i] == "random"),
            "downsample": self._nearest(number, partial(self._is_baseline, name="downsample")),
            "runner-up": self._runner_up(number),
            "equal time": self._equal_time(number),
        }
        for reference, other in others.items():
            if other is not None and other != number:
                yield self._against(reference, number, other)

    def _against(self, reference: Reference, number: int, other: int) -> Against:
        scores, others = self.scores[number], self.scores[other]
        gap = paired_difference(scores, others, self.clusters)
        row, time, other_time = self.rows[other], self.rows[number].prefill_ms, self.rows[other].prefill_ms
        return Against(
            reference,
            row.method,
            row.keep,
            row.tokens_average,
            gap.difference,
            gap.low,
            gap.high,
            p=exact_p(scores, others, self.clusters),
            time_ratio=other_time / time if reference == "equal time" and time and other_time else None,
        )

    def _runner_up(self, number: int) -> int | None:
        """Return the next accurate row of the same budget with about as many tokens."""
        row = self.rows[number]
        budget = [
            i
            for i, other in enumerate(self.rows)
            if self.kinds[i] in REDUCING
            and other.keep == row.keep
            and similar(other.tokens_average, row.tokens_average)
        ]
        budget.sort(key=lambda i: -self.rows[i].accuracy)  # stable: of equal rows the first run leads
        place = budget.index(number) + 1
        return budget[place] if place < len(budget) else None

    def _equal_time(self, number: int) -> int | None:
        """Return the baseline whose prefill time is nearest to a method's; ``None`` for baselines, or if not timed."""
        time = self.rows[number].prefill_ms
        if not time or self.kinds[number] != "method":
            return None
        timed = [
            (abs(math.log(other.prefill_ms / time)), i)
            for i, other in enumerate(self.rows)
            if self.kinds[i] in BASELINES and other.prefill_ms
        ]
        return min(timed)[1] if timed else None

    # -- groups of questions --------------------------------------------------------------------------------------

    def _groups(self, number: int) -> Iterator[GroupScore]:
        if self.blind is not None and number != self.blind:
            yield self._score("needs image", number, self.blind, ~self._right(self.blind))
        splitter = self._splitter(number)
        if splitter is None:
            return
        hard = ~self._right(splitter)
        yield self._score("hard", number, splitter, hard)
        yield self._score("easy", number, splitter, ~hard)
        if self.full is not None:
            known = self._right(self.full)
            yield self._score("hard, full right", number, splitter, hard & known)
            yield self._score("easy, full right", number, splitter, ~hard & known)

    def _score(self, group: Group, number: int, by: int, chosen: Chosen) -> GroupScore:
        count = int(chosen.sum())
        score = GroupScore(group, self.rows[by].label, count, count < FEW)
        if not count:
            return score
        scores, clusters = self.scores[number][:, chosen], self.clusters[chosen]
        low, high = interval(scores, clusters)
        score = replace(score, accuracy=float(scores.mean()), low=low, high=high)
        random = self._nearest(number, lambda i: self.kinds[i] == "random")
        if score.few or self.kinds[number] not in REDUCING or random in (None, number):
            return score
        gap = paired_difference(scores, self.scores[random][:, chosen], clusters)
        return replace(score, difference=gap.difference, difference_low=gap.low, difference_high=gap.high)

    def _splitter(self, number: int) -> int | None:
        """Return the row whose answers make the hard group: downsample with about as many tokens, or else pool."""
        if self.kinds[number] not in REDUCING:
            return None
        for name in SPLITTERS:
            row = self._nearest(number, partial(self._is_baseline, name=name))
            if row is not None:
                return row
        return None

    def _right(self, number: int) -> Chosen:
        """Return which questions a row answers right, by the mean of its seeds; half a point is enough."""
        return np.asarray(self.scores[number].mean(0) >= 0.5)

    # -- guarded types --------------------------------------------------------------------------------------------

    def _guards(self, number: int) -> Iterator[Guard]:
        row = self.rows[number]
        if row.difference is None or row.difference <= -HIDDEN_LOSS:  # the mean shows the loss
            return
        names = [score.type for score in row.types]
        guarded = guarded_types(names, str(self.results.settings.get("metric")))
        for score in row.types:
            gap, low, high = score.difference, score.difference_low, score.difference_high
            if score.type not in guarded or gap is None or low is None or high is None:
                continue
            if gap < -HIDDEN_LOSS and high < 0 and self._loses(number, score.type, FALSE_ALARMS / len(guarded)):
                yield Guard(score.type, score.samples, gap, low, high, row.difference)

    def _loses(self, number: int, type: str, alpha: float) -> bool:
        """Return whether a row is below full on a question type, tested one-sided at the level ``alpha``."""
        if self.full is None:
            return False
        chosen = np.array([question.type == type for question in self.results.questions])
        scores, full = self.scores[number][:, chosen], self.scores[self.full][:, chosen]
        seeds = between_seeds(scores) + between_seeds(full)
        counts = effective_counts(scores.mean(0) - full.mean(0), self.clusters[chosen], seeds)
        _, high = tango(*counts, z=NormalDist().inv_cdf(1 - alpha))
        return bool(high < 0)

    # -- rows -----------------------------------------------------------------------------------------------------

    def _first(self, kind: Kind) -> int | None:
        return next((i for i, other in enumerate(self.kinds) if other == kind), None)

    def _is_baseline(self, number: int, name: str) -> bool:
        return self.kinds[number] == "baseline" and plain_name(self.rows[number].method) == name

    def _nearest(self, number: int, accept: Callable[[int], bool]) -> int | None:
        """Return the accepted row with the most similar number of tokens, if it is similar; a row's own is itself."""
        tokens = self.rows[number].tokens_average
        if accept(number):
            return number
        rows = [i for i in range(len(self.rows)) if accept(i) and similar(self.rows[i].tokens_average, tokens)]
        return min(rows, key=lambda i: abs(math.log(self.rows[i].tokens_average / tokens)), default=None)


def guarded_types(types: Sequence[str], metric: str) -> list[str]:
    """Return the question types that a mean must not hide: places and text, by their names.

    All types are guarded if no name is known, or if the metric is one for text to read.
    """
    if metric in GUARDED_METRICS:
        return list(types)
    return [name for name in types if GUARDED.search(name)] or list(types)
