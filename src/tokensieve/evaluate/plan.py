"""Which runs a comparison consists of: methods x budgets x seeds, as rows of runs."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import Method, parse

ORACLE = "oracle"
FINE_TUNED = "fine-tuned"
Convention: TypeAlias = Literal["kept", "average"]


@dataclass(frozen=True)
class Run:
    """One pass over the data. Equal keys mean equal predictions.

    Attributes:
        key: the full spec (with budget and seed) and, for methods that are not built in, a digest of their code.
        stages: the methods; none for the oracle.
    """

    key: str
    stages: tuple[Method, ...]


@dataclass(frozen=True)
class Entry:
    """One row of the table: a method at a budget, averaged over its runs (one per seed).

    Attributes:
        trained: whether it runs on the model that was fine-tuned with it, not on the one that it is compared with.
    """

    method: str
    keep: Budget | None
    runs: tuple[Run, ...]
    trained: bool = False

    def fine_tuned(self) -> Entry:
        """The same on the model that was fine-tuned with it."""
        runs = tuple(replace(run, key=f"{run.key} {FINE_TUNED}") for run in self.runs)
        return Entry(f"{self.method} {FINE_TUNED}", self.keep, runs, trained=True)


def plan(
    methods: Sequence[str], keeps: Sequence[Budget], *, seeds: int, oracle: bool, budget: Convention = "kept"
) -> list[Entry]:
    """The rows, full first, the oracle's last; repeated ones are left out.

    A spec whose budget is open runs at every one of ``keeps`` (at its own default if there is none), a spec with a
    budget of its own only there.

    Args:
        budget: what ``keeps`` count: the tokens kept in the end, or, for methods inside the LLM, the tokens averaged
            over its blocks. For methods before the LLM the two are the same.

    Raises:
        ValueError: unknown method, parameter or convention, bad budget, fewer than one seed.
    """
    if seeds < 1:
        raise Refusal(f"seeds must be at least 1; got {seeds}")
    if budget not in get_args(Convention):
        raise Refusal(f"budget must be 'kept' or 'average'; got {budget!r}")
    entries = [_entry("full", {}, 1)]
    for spec in methods:
        name = _budget_of(spec, budget)
        entries += (
            [_entry(spec, {name: keep}, seeds) for keep in keeps] if name and keeps else [_entry(spec, {}, seeds)]
        )
    if oracle:
        entries += [Entry(ORACLE, keep, (Run(f"{ORACLE}(keep={keep!r})", ()),)) for keep in keeps]
    unique: dict[tuple[str, ...], Entry] = {}
    for entry in entries:
        unique.setdefault(tuple(run.key for run in entry.runs), entry)
    return list(unique.values())


def _budget_of(spec: str, budget: Convention) -> str | None:
    """The parameter that a spec leaves open for the budgets."""
    if _names(spec, "average"):
        return None
    if budget == "average" and _is_open(spec, "average"):
        return "average"
    return "keep" if _is_open(spec, "keep") else None


def _entry(spec: str, given: dict[str, Any], seeds: int) -> Entry:
    stages = parse(spec, **given)
    budgets = [getattr(stage, "average", None) or stage.keep for stage in stages if hasattr(stage, "keep")]
    runs = [parse(spec, **given, seed=seed) for seed in range(seeds)] if _is_open(spec, "seed") else [stages]
    return Entry(spec, budgets[-1] if budgets else None, tuple(Run(_key(run), tuple(run)) for run in runs))


def _is_open(spec: str, parameter: str) -> bool:
    """Whether some stage has the parameter and the spec does not give it."""
    having = sum(hasattr(stage, parameter) for stage in parse(spec))
    return having > _names(spec, parameter)


def _names(spec: str, parameter: str) -> int:
    """How often the spec gives the parameter."""
    return len(re.findall(rf"[(,]\s*{parameter}\s*=", spec))


def _key(stages: Sequence[Method]) -> str:
    code = b"".join(_foreign_code(type(stage)) for stage in stages)
    mark = f" #{hashlib.sha256(code).hexdigest()[:8]}" if code else ""
    return " + ".join(map(str, stages)) + mark


def _foreign_code(cls: type) -> bytes:
    """The file of a method that is not part of Tokensieve: its predictions are void once it is edited."""
    if cls.__module__.split(".")[0] == "tokensieve":
        return b""
    try:
        return Path(inspect.getfile(cls)).read_bytes()
    except (OSError, TypeError):  # made in a notebook
        return b""
