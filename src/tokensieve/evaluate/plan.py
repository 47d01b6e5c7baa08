"""Settings of a comparison, and the runs that it consists of: methods × budgets × seeds."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from tokensieve.budget import Budget, BudgetScope, rule_of
from tokensieve.engine.nets import BUNDLED, RANDOM, folder_of
from tokensieve.errors import Refusal, nearest
from tokensieve.evaluate.metrics import METRICS
from tokensieve.evaluate.rows import BLIND, FULL, ORACLE
from tokensieve.methods import Method, MethodInfo, Positions, Repair, TrainedMethod, parse
from tokensieve.methods.spec import expand
from tokensieve.models.layout import Separators

FINE_TUNED = "fine-tuned"
READ = 1 << 26  # bytes of a file of weights that is read for its digest
KeepMeans: TypeAlias = Literal["final", "average"]
"""Meaning of a budget: tokens that remain after the last layer, or, inside the LLM, the average over its layers."""


@dataclass(frozen=True)
class Settings:
    """Options of a comparison, validated on creation.

    Attributes:
        batch_size: largest number of questions per forward. "auto" is 16, and on a GPU twice as many after each batch
            as long as they fit into memory. A batch that does not fit is answered in halves.
        max_new_tokens: longest answer.
        metric: a name in :data:`~tokensieve.evaluate.METRICS`.
        seeds: runs of a method whose ``seed`` is open.
        keep_means: meaning of a budget for methods inside the LLM: "final" tokens, or the "average" over its layers.
            Each row reports both.
        budget_scope, separators, positions, repair, reselect: as for ``attach``.
        prompt: text of the user turn; ``{question}`` is replaced.
        processor_for_text: pass the processor to ``attach``, so that text-informed methods use the user's words only.
        measure: also measure FLOPs, latency and memory, on the first sample alone.
        examples: number of images whose decisions are recorded for the report.
        strict: end at the first image that cannot be read, instead of skipping its questions.
        referee: also answer every question without its image (the "blind" row), and answer the examples again with
            their images moved by a few pixels.

    Raises:
        Refusal: naming the option, the value and the allowed ones.
    """

    batch_size: int | Literal["auto"] = 16
    max_new_tokens: int = 16
    metric: str = "exact"
    seeds: int = 5
    keep_means: KeepMeans = "final"
    budget_scope: BudgetScope = "image"
    separators: Separators = "kept-lines"
    prompt: str = "{question}"
    processor_for_text: bool = True
    measure: bool = True
    examples: int = 4
    strict: bool = False
    positions: Positions = "original"
    repair: Repair | None = None
    reselect: bool = False
    referee: bool = True

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise Refusal(f"unknown metric {self.metric!r}; {nearest(self.metric, list(METRICS))}")
        if self.batch_size != "auto" and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise Refusal(f"batch_size must be 'auto' or a number of at least 1; got {self.batch_size!r}")
        if "{question}" not in self.prompt:
            raise Refusal(f"the prompt must contain {{question}}; got {self.prompt!r}")
        if self.repair not in (None, *get_args(Repair)):
            raise Refusal(f"repair must be None, 'size' or 'restore'; got {self.repair!r}")
        _check(self.seeds, self.keep_means)

    def plan(
        self, methods: Sequence[str], keeps: Sequence[Budget], *, oracle: bool = False, blind: bool = False
    ) -> list[Entry]:
        """Return the rows of a comparison under these settings, see :func:`plan`."""
        return plan(methods, keeps, seeds=self.seeds, oracle=oracle, blind=blind, keep_means=self.keep_means)

    def attach_options(self) -> dict[str, Any]:
        """Return the settings that ``attach`` takes and that change a single prompt; ``reselect`` changes none."""
        names = ("budget_scope", "separators", "positions", "repair")
        return {name: getattr(self, name) for name in names}

    def prediction_setup(self) -> dict[str, Any]:
        """Return the settings that change a prediction. Predictions made under other ones are not reused."""
        names = ("prompt", "max_new_tokens", "processor_for_text")
        options = self.attach_options()
        if self.repair is None:  # predictions of releases without it can be continued
            del options["repair"]
        if self.reselect:
            options["reselect"] = True
        return {name: getattr(self, name) for name in names} | options


@dataclass(frozen=True)
class Run:
    """One pass over the data. Runs with equal keys give equal predictions.

    Attributes:
        key: the full spec (with budget and seed) and, for methods that are not built in, a digest of their code; for
            trained methods, one of their folder of weights.
        stages: the methods; empty for the oracle and for the blind row.
    """

    key: str
    stages: tuple[Method, ...]


@dataclass(frozen=True)
class Entry:
    """One row of the table: a method at a budget, averaged over its runs (one per seed).

    Attributes:
        trained: run on the model that was fine-tuned with the method, instead of on the compared model.
    """

    method: str
    keep: Budget | None
    runs: tuple[Run, ...]
    trained: bool = False

    def fine_tuned(self) -> Entry:
        """Return the same row for the model that was fine-tuned with the method."""
        runs = tuple(replace(run, key=f"{run.key} {FINE_TUNED}") for run in self.runs)
        return Entry(f"{self.method} {FINE_TUNED}", self.keep, runs, trained=True)

    def with_stages_of(self, calibrate: Callable[[Sequence[Method]], Sequence[Method]]) -> Entry:
        """Return the same row with other stages in each run, those that ``calibrate`` returns."""
        stages = [tuple(calibrate(run.stages)) for run in self.runs]
        if stages == [run.stages for run in self.runs]:
            return self
        return replace(self, keep=_budget_of(stages[0]), runs=tuple(Run(_key(one), one) for one in stages))


def plan(
    methods: Sequence[str],
    keeps: Sequence[Budget],
    *,
    seeds: int,
    oracle: bool,
    blind: bool = False,
    keep_means: KeepMeans = "final",
) -> list[Entry]:
    """Return the rows of a comparison without duplicates: full first, the oracle's and the blind row last.

    A spec with an open budget runs at each of ``keeps``, or at its default if there are none. A spec that gives its
    budget runs once, at that budget.

    Args:
        keep_means: as in :class:`Settings`. For methods before the LLM both meanings are the same.

    Raises:
        Refusal: unknown method, parameter or meaning, bad budget, fewer than one seed.
    """
    _check(seeds, keep_means)
    if keep_means == "average" and (rules := [keep for keep in keeps if rule_of(keep)]):
        raise Refusal(f"keep_means='average' is for budgets that are numbers; got {rules[0]!r}")
    methods, _ = expand(methods)
    entries = [_entry(FULL, {}, 1)]
    for spec in methods:
        name = _open_budget(spec, keep_means)
        if keeps and name == "average" and _is_solved_for(spec):  # the budgets of both stages are worked out together
            entries += [replace(_entry(spec, {"keep": f"layers:{keep!r}"}, seeds), keep=keep) for keep in keeps]
            continue
        budgets: list[dict[str, Any]] = [{name: keep} for keep in keeps] if name else []
        entries += [_entry(spec, parameters, seeds) for parameters in budgets or [{}]]
    if oracle:
        limits = [rule.wanted if (rule := rule_of(keep)) else keep for keep in keeps]
        entries += [Entry(ORACLE, keep, (Run(f"{ORACLE}(keep={keep!r})", ()),)) for keep in limits]
    entries += [Entry(BLIND, None, (Run(BLIND, ()),))] if blind else []
    unique: dict[tuple[str, ...], Entry] = {}
    for entry in entries:
        unique.setdefault(tuple(run.key for run in entry.runs), entry)
    return list(unique.values())


def _check(seeds: int, keep_means: KeepMeans) -> None:
    if seeds < 1:
        raise Refusal(f"seeds must be at least 1; got {seeds}")
    if keep_means not in get_args(KeepMeans):
        raise Refusal(f"keep_means must be 'final' or 'average'; got {keep_means!r}")


def is_random_baseline(info: MethodInfo) -> bool:
    """Return whether a method is the baseline that draws tokens at random: the baseline with a seed."""
    return info.paper == "baseline" and "seed" in info.parameters


def _open_budget(spec: str, keep_means: KeepMeans) -> str | None:
    """Return the name of the parameter that takes the budgets of the comparison, if the spec leaves one open."""
    if _times_given(spec, "average"):
        return None
    if keep_means == "average" and _is_open(spec, "average"):
        return "average"
    return "keep" if _is_open(spec, "keep") else None


def _entry(spec: str, parameters: dict[str, Any], seeds: int) -> Entry:
    stages = parse(spec, **parameters)
    runs = [parse(spec, **parameters, seed=seed) for seed in range(seeds)] if _is_open(spec, "seed") else [stages]
    return Entry(spec, _budget_of(stages), tuple(Run(_key(run), tuple(run)) for run in runs))


def _budget_of(stages: Sequence[Method]) -> Budget | None:
    """Return the budget of the last stage that has one."""
    budgets = [getattr(stage, "average", None) or stage.keep for stage in stages if hasattr(stage, "keep")]
    return budgets[-1] if budgets else None


def _is_open(spec: str, parameter: str) -> bool:
    """Return whether some stage has the parameter and the spec does not give it."""
    return sum(hasattr(stage, parameter) for stage in parse(spec)) > _times_given(spec, parameter)


def _is_solved_for(spec: str) -> bool:
    """Return whether the connector stage of a pipeline leaves its budget open, as the stage inside the LLM does."""
    parts = [(part.info.stage, "keep" in part.info.parameters) for part in parse(spec)]
    stages = [stage for stage, budgeted in parts if budgeted]
    return stages == ["connector", "decoder"] and _times_given(spec, "keep") == 0


def _times_given(spec: str, parameter: str) -> int:
    return len(re.findall(rf"[(,]\s*{parameter}\s*=", spec))


def _key(stages: Sequence[Method]) -> str:
    outside = b"".join(_external_code(type(stage)) + _weights(stage) for stage in stages)
    digest = f" #{hashlib.sha256(outside).hexdigest()[:8]}" if outside else ""
    return " + ".join(map(str, stages)) + digest


def _external_code(cls: type) -> bytes:
    """Return the source file of a method outside Tokensieve: its predictions are invalid once the file is edited."""
    if cls.__module__.split(".")[0] == "tokensieve":
        return b""
    try:
        return Path(inspect.getfile(cls)).read_bytes()
    except (OSError, TypeError):  # defined in a notebook
        return b""


def _weights(method: Method) -> bytes:
    """Return what tells the weights in a user's folder from others: a training into it makes predictions invalid.

    A file of more than :data:`READ` bytes, such as an authors' checkpoint, counts by its size and time of change.
    """
    if not isinstance(method, TrainedMethod) or method.weights in (BUNDLED, RANDOM):
        return b""
    files = sorted(path for path in folder_of(method).glob("*") if path.suffix in (".safetensors", ".bin", ".json"))
    stats = [(path, path.stat()) for path in files]
    parts = [p.read_bytes() if s.st_size <= READ else f"{s.st_size} {s.st_mtime_ns}".encode() for p, s in stats]
    return b"".join(hashlib.sha256(part).digest() for part in parts)
