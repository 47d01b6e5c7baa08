"""Decisions that the results allow: the best method of each budget, its gaps, and the rows that are worth their cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median_low

from tokensieve.evaluate import PairedDifference, Results, Row
from tokensieve.evaluate.table import SIMILAR
from tokensieve.report.table import (
    Cost,
    Line,
    baseline_methods,
    budget,
    kind_of,
    named,
    percent,
    points,
    points_interval,
    spread,
    to_full,
)

EQUAL = 1.02  # budgets written differently ("25%" and "36") are one if their tokens differ by at most this factor


@dataclass(frozen=True)
class Choice:
    """The most accurate row of a budget against the other ranked rows.

    Attributes:
        best: the line.
        gaps: for each other ranked row, by falling accuracy: the row and the best row's paired difference to it.
    """

    best: Line
    gaps: tuple[tuple[Row, PairedDifference], ...]

    @property
    def title(self) -> str:
        """Return the name of the best row; a baseline is marked as one."""
        return self.best.row.method + (" (a baseline)" if self.best.kind in ("baseline", "random") else "")

    @property
    def against_full(row: Row) -> str:
    """Return the paired gap to the full model in words; nothing without one."""
    gap = to_full(row)
    if gap is None:
        return ""
    difference, low, high = gap
    told_apart = low > 0 or high < 0
    text = f"{points(difference)} points to full ({points_interval(low, high)})"
    return text if told_apart else f"{text}, not told apart from it"


def flops(row: Row) -> str:
    """Return the share of the FLOPs; nothing if they were not measured."""
    return "" if row.flops_ratio is None else f"{row.flops_ratio:.0%} of the FLOPs"


def faster(row: Row) -> bool | None:
    """Return whether the prefill is faster (True) or slower (False) than the full model's; ``None``: the quartiles hold 1."""
    low, high = row.prefill_speedup_low, row.prefill_speedup_high
    if low is None or high is None:
        return None
    return True if low > 1 else False if high < 1 else None


def prefill(row: Row) -> str:
    """Return the prefill speedup in words; a claim only where the quartiles exclude 1."""
    if row.prefill_speedup is None:
        return ""
    quartiles = spread(row.prefill_speedup_low, row.prefill_speedup_high, ".2f")
    verdict = faster(row)
    if verdict is None:
        return f"prefill time not told apart from full's ({quartiles}×)" if quartiles else ""
    return f"{'faster' if verdict else 'slower'} prefill: {row.prefill_speedup:.2f}× ({quartiles})"


def break_even(row: Row) -> str:
    """Return the break-even in words."""
    if row.break_even == "after" and row.break_even_tokens is not None:
        high = "never" if row.break_even_high is None else f"{row.break_even_high:.2g}"
        low = "" if row.break_even_low is None else f" ({row.break_even_low:.2g} to {high})"
        return f"saves time after {row.break_even_tokens:.2g} generated tokens{low}"
    words = {
        "at once": "saves time from the first token",
        "never": "never saves time",
        "not told apart": "break-even not told apart",
    }
    return words.get(row.break_even or "", "")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -- budgets --------------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    name: str
    tokens: float
    members: list[Row]


def _cost_of(row: Row) -> float:
    return row.tokens_average if row.flops_ratio is None else row.flops_ratio


def _similar(tokens: float, others: float, factor: float = SIMILAR) -> bool:
    return max(tokens, others) <= factor * max(min(tokens, others), 1e-9)


def _by_budget(rows: Sequence[Row]) -> list[_Group]:
    """Return the rows per budget, the largest first.

    A row belongs to the budget that the user asked for. A method that chooses its number of tokens belongs to the
    budget with about as many, or to a group of such methods.
    """
    asked: dict[str, list[Row]] = {}
    for row in rows:
        if row.keep is not None:
            asked.setdefault(budget(row.keep), []).append(row)
    groups: list[_Group] = []
    for name, members in asked.items():
        tokens = _tokens(members)
        twin = next((group for group in groups if _similar(group.tokens, tokens, EQUAL)), None)
        if twin is None:
            groups.append(_Group(name, tokens, members))
        else:
            twin.name, twin.members = f"{twin.name} = {name}", twin.members + members
    for row in sorted((row for row in rows if row.keep is None), key=lambda row: -row.tokens_average):
        near = [group for group in groups if _similar(group.tokens, row.tokens_average)]
        if near:
            min(near, key=lambda group, tokens=row.tokens_average: abs(group.tokens - tokens)).members.append(row)
        else:
            groups.append(_Group("its choice", row.tokens_average, [row]))
    return sorted(groups, key=lambda group: -group.tokens)


def _tokens(rows: Sequence[Row]) -> float:
    """Return the usual number of tokens of a budget: of the rows that act before the LLM, if there are any."""
    before_llm = [row.tokens_average for row in rows if row.tokens_average == row.tokens_after]
    return median_low(before_llm or [row.tokens_average for row in rows])
