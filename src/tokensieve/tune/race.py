"""Successive halving on paired samples: all configurations answer the same questions, and fewer of them answer more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokensieve.errors import Refusal
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.intervals import Floats
from tokensieve.tune.asking import Asker
from tokensieve.tune.space import Candidate
from tokensieve.tune.statistics import chance, surely_worse

FIRST = 24  # questions of the first round, at least
FINALISTS = 3  # configurations that the held-out questions judge, at most
Blocks = list[list[Sample]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Standing:
    """A configuration after the questions that it has answered.

    Attributes:
        cost: of a prefill, relative to the unreduced model.
        chance: probability that the held-out questions will prove the bound.
        drop: mean drop so far.
    """

    candidate: Candidate
    cost: float
    chance: float
    drop: float

    @property
    def expected_saving(self) -> float:
        """The saving if the bound is proven, and nothing otherwise, weighted by the probabilities."""
        return (1 - self.cost) * self.chance


def rounds(images: Sequence[Sequence[Sample]], contestants: int) -> Blocks:
    """Split questions into blocks of whole images, so that each block doubles the number of questions so far.

    Args:
        images: the questions, by image.
        contestants: configurations at the start; there are as many halvings as lead to :data:`FINALISTS` of them.
    """
    total = sum(map(len, images))
    halvings = max(0, int(np.ceil(np.log2(max(1, contestants / FINALISTS)))))
    ends = [total / 2**n for n in range(halvings, -1, -1) if total / 2**n >= FIRST or n == 0]
    blocks: Blocks = [[]]
    count = 0
    for questions in images:
        if count >= ends[len(blocks) - 1]:
            blocks.append([])
        blocks[-1] += questions
        count += len(questions)
    return blocks


class Race:
    """Narrows configurations down to those that are worth held-out questions.

    Args:
        costs: cost of each candidate's prefill by its key, relative to the unreduced model.
        held_out: number of held-out questions.
        halve: ``False`` lets every candidate answer everything (an exhaustive search).

    Attributes:
        failed: the reason of each candidate that refused a question, by its key.
    """

    def __init__(
        self, asker: Asker, costs: Mapping[str, float], held_out: int, max_drop: float, *, halve: bool = True
    ) -> None:
        self.asker, self.costs, self.held_out, self.max_drop, self.halve = asker, costs, held_out, max_drop, halve
        self.failed: dict[str, str] = {}

    def run(self, candidates: Sequence[Candidate], blocks: Blocks, progress: Progress | None = None) -> list[Standing]:
        """Return the candidates that remain after all blocks, by expected saving, the largest first."""
        remaining, seen = list(candidates), list[Sample]()
        done = 0
        total = _planned(len(remaining), blocks, self.halve)
        standings: list[Standing] = []
        for number, block in enumerate(blocks):
            seen += block
            for candidate in [None, *remaining]:
                if progress is not None:
                    label = "the unreduced model" if candidate is None else str(candidate)
                    progress(min(done, total), total, f"round {number + 1} of {len(blocks)}: {label}")
                self._ask(candidate, block)
                done += len(block)
            standings = self._standings([c for c in remaining if c.run.key not in self.failed], seen)
            if self.halve and number + 1 < len(blocks):
                standings = self._survivors(standings, seen)
            remaining = [standing.candidate for standing in standings]
        return standings

    def _ask(self, candidate: Candidate | None, block: Sequence[Sample]) -> None:
        try:
            self.asker.ask(candidate, block)
        except Refusal as error:
            if candidate is None:
                raise
            self.failed[candidate.run.key] = str(error)

    def _standings(self, candidates: Sequence[Candidate], seen: Sequence[Sample]) -> list[Standing]:
        full, standings = self.asker.scores(None, seen), []
        for candidate in candidates:
            scores = self.asker.scores(candidate, seen)
            likely = chance(full, scores, self.held_out, self.max_drop)
            standings.append(Standing(candidate, self.costs[candidate.run.key], likely, mean_drop(full, scores)))
        return sorted(standings, key=lambda standing: -standing.expected_saving)

    def _survivors(self, standings: Sequence[Standing], seen: Sequence[Sample]) -> list[Standing]:
        """Return the better half without what surely breaks the bound; :data:`FINALISTS` always stay."""
        full = self.asker.scores(None, seen)
        half = list(standings)[: max(FINALISTS, (len(standings) + 1) // 2)]
        return half[:FINALISTS] + [
            standing
            for standing in half[FINALISTS:]
            if not surely_worse(full, self.asker.scores(standing.candidate, seen), self.max_drop)
        ]


def mean_drop(full: Floats, reduced: Floats) -> float:
    """Return the mean drop over the questions that both have answered."""
    return float(np.nanmean(full - reduced))


def finalists(standings: Sequence[Standing]) -> list[Standing]:
    """Return the configurations for the held-out questions, the safest first and each cheaper than the one before.

    They are the one with the largest expected saving, the next safer one and the next cheaper one. In this order each
    can be tested at the full confidence, until the first that fails (fixed-sequence testing).
    """
    if not standings:
        return []
    best = max(standings, key=lambda standing: standing.expected_saving)
    safer = [s for s in standings if s.chance > best.chance and s.cost > best.cost]
    cheaper = [s for s in standings if s.chance < best.chance and s.cost < best.cost]
    first = [max(safer, key=lambda standing: standing.expected_saving)] if safer else []
    last = [max(cheaper, key=lambda standing: standing.expected_saving)] if cheaper else []
    return [*first, best, *last]


def _planned(contestants: int, blocks: Blocks, halve: bool) -> int:
    """Return the number of answers of a race in which no candidate leaves early."""
    total = 0
    for block in blocks:
        total += (contestants + 1) * len(block)
        contestants = max(min(contestants, FINALISTS), (contestants + 1) // 2) if halve else contestants
    return total
