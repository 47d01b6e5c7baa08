"""The methods of a training by step: lists of methods and budgets, from which each step draws, in phases."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.evaluate.plan import plan
from tokensieve.evaluate.rows import FULL
from tokensieve.methods import Method

Stages = tuple[Method, ...]


@dataclass(frozen=True)
class Draw:
    """One method at one budget: its stages, and the text that names it."""

    name: str
    stages: Stages

    def with_seed(self, seed: int) -> Stages:
        """Return the stages, those that draw at random with another seed."""
        changed: dict[str, Any] = {"seed": seed}
        return tuple(replace(stage, **changed) if hasattr(stage, "seed") else stage for stage in self.stages)


@dataclass(frozen=True)
class Phase:
    """The draws from a share of the steps on.

    Attributes:
        start: share of all steps, from 0 to below 1.
        draws: the methods at their budgets.
    """

    start: float
    draws: tuple[Draw, ...]


class Schedule:
    """Phases in order; the first starts at 0."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = tuple(phases)
        starts = [phase.start for phase in self.phases]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1:
            shares = ", ".join(f"{start:.4g}" for start in starts)
            raise Refusal(f"the phases of a schedule start at rising shares from 0 to below 1; got {shares or 'none'}")

    @classmethod
    def of(cls, phases: Mapping[float, Sequence[str]], keeps: Sequence[Budget]) -> Schedule:
        """Return the schedule of specs by the share of the steps at which they start.

        A spec with an open budget is drawn at each of ``keeps``.
        """
        return cls([Phase(start, _draws(methods, keeps)) for start, methods in phases.items()])

    @property
    def draws(self) -> list[Draw]:
        """All draws without repetition, in order."""
        return list({draw.name: draw for phase in self.phases for draw in phase.draws}.values())

    def phase(self, step: int, steps: int) -> Phase:
        """Return the phase of one of ``steps`` steps, counted from 0."""
        return next(phase for phase in reversed(self.phases) if step >= phase.start * steps)

    def stages(self, step: int, steps: int, seed: int, joint: bool = False) -> list[Stages]:
        """Return the methods of a step; the choice depends on seed and step only, so a resumed run makes it again.

        Args:
            joint: all of the phase's draws, instead of one.
        """
        chance, draws = random.Random(f"{seed}:{step}"), self.phase(step, steps).draws
        chosen = draws if joint else [chance.choice(draws)]
        return [draw.with_seed(chance.randrange(2**31)) for draw in chosen]

    def to_json(self) -> list[dict[str, object]]:
        return [{"start": phase.start, "methods": [draw.name for draw in phase.draws]} for phase in self.phases]


def _draws(methods: Sequence[str], keeps: Sequence[Budget]) -> tuple[Draw, ...]:
    runs = [run for entry in plan(methods, keeps, seeds=1, oracle=False) for run in entry.runs]
    draws = [Draw(" + ".join(map(str, run.stages)), run.stages) for run in runs]
    return tuple(draw for draw in draws if draw.name != FULL or FULL in methods)  # a comparison always has this row
