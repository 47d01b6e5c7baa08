"""Rows that papers print, and the name by which one is reproduced: ``model/benchmark/method@tokens``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tokensieve.errors import Refusal, nearest
from tokensieve.evaluate.plan import KeepMeans
from tokensieve.evaluate.rows import FULL
from tokensieve.methods import parse
from tokensieve.reproduce.recipes import BENCHMARKS, MODELS, OFFICIAL, RENUMBERED_INSIDE, Benchmark, VisionModel

PUBLISHED = Path(__file__).with_name("published.json")
FORM = "llava-1.5-7b/pope/vtc-cls@64 (model/benchmark/method@tokens)"


@dataclass(frozen=True)
class Published:
    """One number of a paper.

    Attributes:
        model, benchmark: keys of the recipes.
        method: as in specs, without parameters.
        tokens: the budget; ``None`` for the full model.
        value, full: the number, and that of the full model in the same table (``None`` where it is not printed).
        keep_means: meaning of the tokens inside the LLM; ``None`` where the source does not say it.
        source, note: of the table.
    """

    model: str
    benchmark: str
    method: str
    tokens: int | None
    value: float
    full: float | None
    keep_means: KeepMeans | None
    source: str
    note: str

    @property
    def rounding(self) -> float:
        """Half of the last printed digit: tables have one decimal, and often none in MME's sums."""
        whole = BENCHMARKS[self.benchmark].scale > 100 and float(self.value).is_integer()
        return 0.5 if whole else 0.05

    @property
    def relative_rounding(self) -> float:
        """The largest error of per cent of full that comes from the rounding of both numbers; 0 without full."""
        if not self.full:
            return 0.0
        full_rounding = replace(self, value=self.full).rounding
        return 100 * (self.rounding + self.value / self.full * full_rounding) / self.full

    @property
    def name(self) -> str:
        """The name that reproduces it."""
        return f"{self.model}/{self.benchmark}/{self.method}{'' if self.tokens is None else f'@{self.tokens}'}"


def published_rows() -> list[Published]:
    """Return every number of ``published.json`` that has a recipe, of methods that take a budget."""
    rows = []
    for table in json.loads(PUBLISHED.read_text("utf-8"))["tables"]:
        model = table.get("model", "llava-1.5-7b")
        full = table["full"] or [None] * len(table["columns"])
        lines = [[FULL, None, *full], *(line for line in table["rows"] if _takes_a_budget(line[0]))]
        for place, benchmark in enumerate(table.get("benchmarks", [])):
            for method, tokens, *cells in lines:
                if benchmark is not None and cells[place] is not None:
                    meaning, about = table.get("keep_means"), (table["source"], table["note"])
                    value = Published(model, benchmark, method, tokens, cells[place], full[place], meaning, *about)
                    rows.append(value)
    return rows


@cache
def _takes_a_budget(method: str) -> bool:
    """Return whether a stage has a budget; MustDrop has thresholds, which no published number of tokens sets."""
    return any(hasattr(stage, "keep") for stage in parse(method))


@dataclass(frozen=True)
class Target:
    """A published row with its recipe.

    Attributes:
        name: as the user wrote it.
        method: spec that repeats the authors' code, without budget; "full" for the full model.
        tokens: the budget, ``None`` for full.
        published: its numbers; two papers can differ.
    """

    name: str
    model: VisionModel
    benchmark: Benchmark
    method: str
    tokens: int | None
    published: tuple[Published, ...]

    @property
    def keep_means(self) -> KeepMeans:
        """Meaning of the tokens in the source; "final" where no source says it."""
        return next((row.keep_means for row in self.published if row.keep_means), "final")

    @property
    def budget_text(self) -> str:
        """The meaning of the budget, for a person."""
        if self.tokens is None:
            return "all tokens"
        if all(stage.info.stage != "decoder" for stage in parse(self.method)):
            return f"{self.tokens} tokens enter the LLM"
        stated = "" if any(row.keep_means for row in self.published) else "; the source does not say which"
        form = {"final": "tokens remain in the end", "average": "tokens on average over the LLM's layers"}
        return f"{self.tokens} {form[self.keep_means]}{stated}"

    @property
    def renumbers(self) -> bool:
        """Whether the authors' code numbers the remaining tokens anew."""
        stages = [] if self.method == FULL else parse(self.method)
        return any(stage.info.stage != "decoder" or stage.info.name in RENUMBERED_INSIDE for stage in stages)


def find_target(name: str, rows: Sequence[Published] | None = None) -> Target:
    """Return the recipe and the published numbers of ``model/benchmark/method@tokens``.

    Raises:
        Refusal: another form, or a part that is unknown, with the nearest names.
    """
    parts = name.split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise Refusal(f"a published row is named as in {FORM}; got {name!r}; 'tokensieve reproduce --list' shows them")
    model, benchmark, spec = parts
    for kind, part, known in (("model", model, MODELS), ("benchmark", benchmark, BENCHMARKS)):
        if part not in known:
            raise Refusal(f"unknown {kind} {part!r}; {nearest(part, list(known))}")
    method, _, budget = spec.rpartition("@") if "@" in spec else (spec, "", "")
    rows = published_rows() if rows is None else rows
    rows = [row for row in rows if (row.model, row.benchmark) == (model, benchmark)]
    place = f"{BENCHMARKS[benchmark].title} with {MODELS[model].title}"
    if method == FULL:
        if budget:
            raise Refusal(f"the full model has no budget; got {name!r}")
        plain, tokens = FULL, None
    else:
        plain = " + ".join(stage.info.name for stage in parse(method))
        if not any(row.method == plain for row in rows):
            raise Refusal(f"no published number of {plain} on {place}; {nearest(plain, {row.method for row in rows})}")
        budgets = sorted({row.tokens for row in rows if row.method == plain and row.tokens})
        if not budget.isdecimal() or int(budget) not in budgets:
            listed = ", ".join(f"{method}@{count}" for count in budgets)
            if not budget:
                raise Refusal(f"{name!r} lacks the number of tokens; published on {place}: {listed}")
            raise Refusal(f"no published number of {plain} at {budget} tokens on {place}; published: {listed}")
        tokens = int(budget)
    matching = tuple(row for row in rows if (row.method, row.tokens) == (plain, tokens))
    return Target(name, MODELS[model], BENCHMARKS[benchmark], OFFICIAL.get(method, method), tokens, matching)
