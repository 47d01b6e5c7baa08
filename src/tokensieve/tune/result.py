"""The answer of a search: a verdict with its reason, the chosen configuration and the evidence."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tokensieve.budget import Budget
from tokensieve.errors import OutputError
from tokensieve.measure import Cost
from tokensieve.methods import Positions
from tokensieve.tune.costs import CostKind
from tokensieve.tune.statistics import Drop

Verdict: TypeAlias = Literal[
    "use", "too few questions", "no configuration holds the bound", "not faster", "the full model fails"
]


@dataclass(frozen=True)
class Finalist:
    """One configuration that the held-out questions judged.

    Attributes:
        method, keep, positions: the configuration; ``spec`` has the budget inside.
        drop: on the held-out questions.
        holds: whether the upper bound of the drop is at most the allowed drop.
        search_drop: mean drop on the search questions. It is too good on average, because it decided the choice.
        tokens_before, tokens_after, tokens_average: visual tokens of a question, after the last layer and averaged over
            the layers of the LLM.
        flops: of a prefill, relative to the unreduced model.
        cost: measured times.
    """

    method: str
    spec: str
    keep: Budget | None
    positions: Positions
    drop: Drop
    holds: bool
    search_drop: float
    tokens_before: float
    tokens_after: float
    tokens_average: float
    flops: float
    cost: Cost

    def __str__(self) -> str:
        return f"{self.spec}{', contiguous positions' * (self.positions == 'contiguous')}"


@dataclass(frozen=True)
class TuneResult:
    """The answer of :func:`tokensieve.tune.tune`.

    Attributes:
        verdict: "use" the chosen configuration, or why not to reduce.
        why: the reason, in a sentence or two.
        chosen: the cheapest configuration with a proven bound; ``None`` unless the verdict is "use".
        tested: all that the held-out questions judged, in this order.
        max_drop, max_latency, cost_kind, seed: as given.
        full_accuracy: of the unreduced model on the held-out questions, if they were asked.
        candidates: configurations of the search.
        refused: {spec: why this model cannot run it}.
        search_questions, held_out_questions: after questions with damaged images are left out.
        answers: questions answered in all, by all configurations and the unreduced model.
        questions_needed: questions in the data, search included, that would probably prove the bound, if that is known.
        spec_file: path of the written spec file; ``None`` unless the verdict is "use".
    """

    verdict: Verdict
    why: str
    max_drop: float
    max_latency: str | None
    cost_kind: CostKind
    seed: int
    candidates: int
    search_questions: int
    held_out_questions: int
    answers: int
    refused: dict[str, str] = field(default_factory=dict)
    chosen: Finalist | None = None
    tested: tuple[Finalist, ...] = ()
    full_accuracy: float | None = None
    questions_needed: int | None = None
    spec_file: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a small JSON file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(new, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
