"""Decisions that the results allow: the best method of each budget, its gaps, and the rows that are worth the cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median_low

from tokensieve.budget import budget_text
from tokensieve.evaluate import PairedDifference, Results, Row
from tokensieve.evaluate.kinds import REDUCING, baseline_methods, kind_of
from tokensieve.evaluate.referee import similar
from tokensieve.report.table import (
    Cost,
    Line,
    number,
    percent,
    points,
    points_interval,
    ratio,
    spread,
    to_full,
)

EQUAL = 1.02  # budgets written differently ("25%" and "36") are one if their tokens differ by at most this factor
UNSURE = 0.05  # a possible loss of accuracy beyond which "not told apart from full" recommends nothing
MEASURED: tuple[Cost, ...] = ("flops_ratio", "prefill_ms")


@dataclass(frozen=True)
class Choice:
    """The most accurate row of a budget against the other ranked rows.

    Attributes:
        best: the line.
        gaps: for each other ranked row, by falling accuracy: the row, and the best row minus it, paired by question.
    """

    best: Line
    gaps: tuple[tuple[Row, PairedDifference], ...]

    @property
    def title(self) -> str:
        """Return the name of the best row; a baseline is marked as one."""
        return self.best.row.method + (" (a baseline)" if self.best.kind in ("baseline", "random") else "")

    @property
    def against_others(self) -> str:
        """Return the gap to the runner-up, and the further rows that are not told apart from the best one."""
        if not self.gaps:
            return "no other method at this budget"
        (runner_up, gap), *more = self.gaps
        verdict = "ahead of" if gap.told_apart else "not told apart from"
        text = f"{verdict} {runner_up.method} ({points(gap.difference)}, {points_interval(gap.low, gap.high)})"
        ties = [row.method for row, further in more if not further.told_apart]
        if ties:
            text += f"{', but not told apart from' if gap.told_apart else ', nor from'} {_listed(ties)}"
        return text

    @property
    def facts(self) -> list[str]:
        """Return the gaps and the costs in words, one fact each."""
        row = self.best.row
        # a prefill that is not told apart from full's has said what an undecided break-even would say again
        undecided = faster(row) is None and row.break_even == "not told apart"
        costs = (flops(row), prefill(row), "" if undecided else break_even(row))
        return list(filter(None, (against_full(row), self.against_others, *costs)))


@dataclass(frozen=True)
class BudgetRows:
    """The rows of one budget, by falling accuracy.

    Attributes:
        name: the budget as the user wrote it; the tokens of methods that choose their number.
        tokens: visual tokens per question, averaged over the LLM's layers, that the ranked rows have (nearly).
        choice: the best row; ``None`` if no row is ranked.
    """

    name: str
    tokens: float
    lines: tuple[Line, ...]
    choice: Choice | None

    @property
    def title(self) -> str:
        """Return the budget with its tokens: ``25% (36 tokens)``, ``36 tokens``."""
        tokens = f"{self.tokens:.4g}"
        return f"{tokens} tokens" if self.name == tokens else f"{self.name} ({tokens} tokens)"

    @property
    def unranked(self) -> tuple[Row, ...]:
        """Return the rows of methods that have too many or too few tokens to be ranked."""
        return tuple(line.row for line in self.lines if not line.ranked and line.kind != "oracle")


class Decision:
    """The results arranged for a choice.

    Attributes:
        results: the results.
        costs: the costs that were measured, FLOPs first; tokens if none was.
        full: the line of the unhooked model; ``None`` if it is missing.
        blind: the line of the model without the image; ``None`` if it is missing.
        budgets: one group per budget, the largest first.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        rows, baselines = results.rows, baseline_methods()
        kinds = {id(row): kind_of(row.method, baselines) for row in rows}
        measured = tuple(cost for cost in MEASURED if any(getattr(row, cost) is not None for row in rows))
        self.costs: tuple[Cost, ...] = measured or ("tokens_average",)
        # the oracle is given the answer's place, and blind makes no use of the image, so both are on no front;
        # uncertain times make no front
        self._candidates = [row for row in rows if kinds[id(row)] not in ("oracle", "blind")]
        fronts = {cost: self.front(cost) for cost in self.costs}

        def line(row: Row, ranked: bool) -> Line:
            on = tuple(cost for cost in self.costs if any(row is member for member in fronts[cost]))
            return Line(row, kinds[id(row)], ranked and kinds[id(row)] in REDUCING, on)

        self.full, self.blind = (
            next((line(row, False) for row in rows if kinds[id(row)] == kind), None) for kind in ("full", "blind")
        )
        self.budgets: tuple[BudgetRows, ...] = tuple(
            self._arranged(group, [line(row, similar(row.tokens_average, group.tokens)) for row in group.members])
            for group in _by_budget([row for row in rows if kinds[id(row)] not in ("full", "blind")])
        )

    def _arranged(self, group: _Group, lines: Sequence[Line]) -> BudgetRows:
        lines = sorted(lines, key=lambda line: (-line.row.accuracy, _cost_of(line.row)))
        choice = None
        if ranked := [line for line in lines if line.ranked]:
            best, *others = ranked
            gaps = tuple((line.row, self.results.paired(best.row, line.row)) for line in others)
            choice = Choice(best, gaps)
        return BudgetRows(group.name, group.tokens, tuple(lines), choice)

    @property
    def without_budget(self) -> tuple[Line, ...]:
        """Return the lines of full and blind, as far as they ran."""
        return tuple(line for line in (self.full, self.blind) if line is not None)

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """Return all lines in the order of the table: full, blind, then the budgets."""
        return (*self.without_budget, *(line for group in self.budgets for line in group.lines))

    def front(self, cost: Cost) -> list[Row]:
        """Return the Pareto front by a cost; empty for times that a note calls uncertain."""
        return [] if cost == "prefill_ms" and self.timing_notes() else pareto(self._candidates, cost)

    @property
    def measured(self) -> bool:
        """Return whether costs were measured."""
        return self.costs != ("tokens_average",)

    @cached_property
    def cheapest(self) -> Row | None:
        """Return the cheapest row whose interval is not below the full model; the most accurate of equal costs."""
        candidates = [(line.row, to_full(line.row)) for line in self.lines if line.kind in REDUCING]
        level = [row for row, gap in candidates if gap is not None and gap[2] >= 0]
        return min(level, key=lambda row: (_cost_of(row), -row.accuracy), default=None)

    @property
    def cheapest_sentence(self) -> str:
        """Return the cheapest row that is not below the full model, in words."""
        if self.full is None or not any(line.kind in REDUCING for line in self.lines):
            return ""
        row = self.cheapest
        gap = None if row is None else to_full(row)
        if row is None or gap is None:
            return "Every method loses accuracy against the full model, by its paired interval."
        difference, low, high = gap
        cost = flops(row) or f"{row.tokens_average:.4g} tokens"
        text = f"{row.label}, with {cost} ({points(difference)} points to full, {points_interval(low, high)})"
        if -low <= UNSURE:
            return f"Cheapest method not told apart from the full model: {text}."
        return (
            f"No method is shown to keep the accuracy of the full model: even for the cheapest that is not told apart "
            f"from it, {text}, a loss of {percent(-low)} points is not excluded."
        )

    def sentences(self) -> Iterator[str]:
        """Yield the decision in words: a sentence per budget, then the cheapest row that loses no accuracy."""
        for group in self.budgets:
            if choice := group.choice:
                accuracy = percent(choice.best.row.accuracy)
                yield f"Best at {group.title}: {choice.title} {accuracy} %, {'; '.join(choice.facts)}."
        if self.cheapest_sentence:
            yield self.cheapest_sentence

    def timing_notes(self) -> list[str]:
        """Return the distinct notes about the timing, as sentences."""
        notes = dict.fromkeys(row.timing_note for row in self.results.rows if row.timing_note)
        return [f"{note[0].upper()}{note[1:].rstrip('.')}." for note in notes]


def pareto(rows: Sequence[Row], cost: Cost) -> list[Row]:
    """Return the rows that no other row dominates: as accurate at a lower cost, or more accurate at no higher cost.

    Costs count as they are shown: half a percent of the FLOPs puts no row on the front.
    """
    values = [(_as_shown(row, cost), row) for row in rows if getattr(row, cost) is not None]
    return [
        row
        for value, row in values
        if not any(
            price <= value and other.accuracy >= row.accuracy and (price < value or other.accuracy > row.accuracy)
            for price, other in values
        )
    ]


# -- words ----------------------------------------------------------------------------------------------------------


def against_full(row: Row) -> str:
    """Return the paired gap to the full model in words; nothing without one."""
    gap = to_full(row)
    if gap is None:
        return ""
    difference, low, high = gap
    text = f"{points(difference)} points to full ({points_interval(low, high)})"
    return text if low > 0 or high < 0 else f"{text}, not told apart from it"


def flops(row: Row) -> str:
    """Return the share of the FLOPs; nothing if they were not measured."""
    return "" if row.flops_ratio is None else f"{row.flops_ratio:.0%} of the prefill FLOPs"


def faster(row: Row) -> bool | None:
    """Return whether the prefill is faster (True) or slower (False) than full's; ``None``: the quartiles hold 1."""
    low, high = row.prefill_speedup_low, row.prefill_speedup_high
    if low is None or high is None:
        return None
    return True if low > 1 else False if high < 1 else None


def prefill(row: Row) -> str:
    """Return the prefill speedup in words; a claim only where the quartiles exclude 1."""
    quartiles = spread(row.prefill_speedup_low, row.prefill_speedup_high, ratio)
    if row.prefill_speedup is None or not quartiles:
        return ""
    verdict = faster(row)
    if verdict is None:
        return f"prefill time not told apart from full's ({quartiles}×)"
    return f"{'faster' if verdict else 'slower'} prefill: {ratio(row.prefill_speedup)}× ({quartiles})"


def break_even(row: Row) -> str:
    """Return the break-even in words."""
    if row.break_even == "after" and row.break_even_tokens is not None:
        last = "never" if row.break_even_high is None else number(row.break_even_high, ".2g")
        quartiles = "" if row.break_even_low is None else f" ({number(row.break_even_low, '.2g')} to {last})"
        return f"saves time after {number(row.break_even_tokens, '.2g')} generated tokens{quartiles}"
    low, high = row.decode_speedup_low, row.decode_speedup_high
    unclear = low is not None and high is not None and low < 1 < high
    words = {
        "at once": "saves time from the first token" + ("; decoding speed not told apart from full's" * unclear),
        "never": "never saves time",
        "not told apart": "time saved over a whole answer: not told apart from none",
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
    return _as_shown(row, "tokens_average" if row.flops_ratio is None else "flops_ratio")


def _as_shown(row: Row, cost: Cost) -> float:
    """Return a cost rounded as in the tables: rows that look equal there are equal."""
    forms = {"flops_ratio": ".2f", "prefill_ms": ".3g", "tokens_average": ".4g"}
    return float(format(getattr(row, cost), forms[cost]))


def _by_budget(rows: Sequence[Row]) -> list[_Group]:
    """Return the rows per budget, the largest first.

    A row belongs to the budget that the user asked for. A method that chooses its number of tokens belongs to the
    budget with about as many, or to a group of such methods.
    """
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        if row.keep is not None:
            by_name.setdefault(budget_text(row.keep), []).append(row)
    groups: list[_Group] = []
    for name, members in by_name.items():
        tokens = _tokens(members)
        twin = next((group for group in groups if similar(group.tokens, tokens, EQUAL)), None)
        if twin is None:
            groups.append(_Group(name, tokens, members))
        else:
            twin.name, twin.members = f"{twin.name} = {name}", twin.members + members
    for row in sorted((row for row in rows if row.keep is None), key=lambda row: -row.tokens_average):
        near = [
            (abs(g.tokens - row.tokens_average), i)
            for i, g in enumerate(groups)
            if similar(g.tokens, row.tokens_average)
        ]
        if near:
            groups[min(near)[1]].members.append(row)
        else:
            groups.append(_Group(f"{row.tokens_average:.4g}", row.tokens_average, [row]))
    return sorted(groups, key=lambda group: -group.tokens)


def _tokens(rows: Sequence[Row]) -> float:
    """Return the usual number of tokens of a budget: of the rows that act before the LLM, if there are any."""
    before_llm = [row.tokens_average for row in rows if row.tokens_average == row.tokens_after]
    return median_low(before_llm or [row.tokens_average for row in rows])
