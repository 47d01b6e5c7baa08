"""Rows of results as text, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

from tokensieve.budget import budget_text
from tokensieve.evaluate import Row, TypeScore
from tokensieve.evaluate.kinds import Kind
from tokensieve.measure import ratio_digits

Cost: TypeAlias = Literal["flops_ratio", "prefill_ms", "tokens_average"]
NONE = "–"


@dataclass(frozen=True)
class Line:
    """One row of the results, with its place in the comparison.

    Attributes:
        row: the row.
        kind: full, oracle, a baseline or a method.
        ranked: whether it can be the best of its budget: no full model, no oracle, and about as many tokens as the
            other rows of the budget.
        front: the costs by which the row is on the Pareto front.
    """

    row: Row
    kind: Kind
    ranked: bool
    front: tuple[Cost, ...]


def percent(share: float) -> str:
    """Return a share in percent: ``92.2``."""
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """Return a difference of shares in signed points: ``−3.2``; only an exact zero has no sign."""
    return "0.0" if abs(difference) < 1e-9 else f"{100 * difference:+.1f}".replace("-", "−")


def points_interval(low: float, high: float) -> str:
    """Return the interval of a difference: ``−5.5 to −1.2``."""
    return f"{points(low)} to {points(high)}"


def to_full(scored: Row | TypeScore) -> tuple[float, float, float] | None:
    """Return (difference, low, high) to the full model; ``None`` for the full model itself."""
    difference, low, high = scored.difference, scored.difference_low, scored.difference_high
    return None if difference is None or low is None or high is None else (difference, low, high)


def p_value(p: float) -> str:
    """Return a p value with two digits; very small ones as a bound."""
    return "<.001" if p < 0.001 else f"{p:.2g}"


def number(value: float | None, form: str = ".3g") -> str:
    """Return a number, or a dash if it was not measured. Large numbers have no exponent: ``12300``.

    Args:
        value: the number.
        form: a format of Python.
    """
    if value is None:
        return NONE
    text = format(value, form)
    return f"{float(text):.0f}" if "e+" in text else text


def ratio(value: float | None) -> str:
    """Return a speedup, or a dash if it was not measured; its side of 1 shows: ``1.003``."""
    return NONE if value is None else ratio_digits(value)


def spread(low: float | None, high: float | None, text: Callable[[float], str] = number) -> str:
    """Return the quartiles ``1.10–1.25``; nothing if they were not measured."""
    return "" if low is None or high is None else f"{text(low)}–{text(high)}"


# -- columns --------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """The text of one cell.

    Attributes:
        value: the number.
        detail: its interval; may be empty.
        lost: whether the whole interval of a difference lies below zero.
    """

    value: str
    detail: str = ""
    lost: bool = False


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        header: its name, short.
        meaning: one line that explains it.
        cell: returns the text of a line.
        brief: leave the details out in the terminal.
        page_only: leave the column out in the terminal.
    """

    header: str
    meaning: str
    cell: Callable[[Line], Cell]
    brief: bool = False
    page_only: bool = False

    def text(self, line: Line) -> str:
        """Return the cell for the terminal: ``92.2 (89.8–94.1)``."""
        value, detail, _ = self.cell(line)
        return f"{value} ({detail})" if detail and not self.brief else value


def _plain(text: Callable[[Row], str]) -> Callable[[Line], Cell]:
    return lambda line: Cell(text(line.row))


def _keep(line: Line) -> Cell:
    if line.row.keep is None:
        return Cell({"full": "all", "blind": "none"}.get(line.kind, NONE))  # the method chooses its number of tokens
    return Cell(budget_text(line.row.keep))


def _tokens(line: Line) -> Cell:
    """Return the tokens by both conventions."""
    after, average = number(line.row.tokens_after, ".4g"), number(line.row.tokens_average, ".4g")
    return Cell(after if after == average else f"{after} ({average})")


def _accuracy(line: Line) -> Cell:
    row = line.row
    return Cell(percent(row.accuracy), f"{percent(row.accuracy_low)}–{percent(row.accuracy_high)}")


def _to_full(line: Line) -> Cell:
    gap = to_full(line.row)
    if gap is None or line.kind == "full":
        return Cell(NONE)
    return Cell(points(gap[0]), points_interval(*gap[1:]), lost=gap[2] < 0)


def _p(line: Line) -> Cell:
    verdict = line.row.referee and line.row.referee.to("full")
    p = verdict.p if verdict else line.row.difference_p  # the referee's also joins the seeds
    return Cell(NONE if line.kind == "full" or p is None else p_value(p))


def _pareto(line: Line) -> Cell:
    words: dict[Cost, str] = {"flops_ratio": "FLOPs", "prefill_ms": "time", "tokens_average": "tokens"}
    return Cell("both" if len(line.front) > 1 else "".join(words[cost] for cost in line.front))


def _timed(name: str, text: Callable[[float | None], str] = number, unit: str = "") -> Callable[[Line], Cell]:
    """Return the cell of a measured median with its quartiles."""

    def cell(line: Line) -> Cell:
        value = getattr(line.row, name)
        low, high = getattr(line.row, f"{name}_low"), getattr(line.row, f"{name}_high")
        if line.kind == "full" and name.endswith("speedup"):
            low = high = None  # 1 by definition
        return Cell(text(value) + unit * (value is not None), spread(low, high, text))

    return cell


def _method_ms(line: Line) -> Cell:
    """Return the method's time; a time whose quartiles reach 0 or less is not told apart from none."""
    low = line.row.method_ms_low
    return Cell("noise") if low is not None and low <= 0 else _timed("method_ms", partial(number, form=".2g"))(line)


def _break_even(line: Line) -> Cell:
    row = line.row
    if line.kind == "full" or row.break_even is None:
        return Cell(NONE)
    if row.break_even != "after" or row.break_even_tokens is None:
        return Cell({"not told apart": "unclear"}.get(row.break_even, row.break_even))
    low, high = row.break_even_low, row.break_even_high
    last = "never" if high is None else number(high, ".2g")
    return Cell(number(row.break_even_tokens, ".2g"), "" if low is None else f"{number(low, '.2g')}–{last}")


METHOD = Column("method", "method spec", _plain(lambda row: row.method))
TOKENS = Column(
    "tokens",
    "visual tokens per question that stay at the end; in brackets averaged over the LLM's layers, where that differs",
    _tokens,
)
KEEP = Column("keep", "budget: tokens per image, or a share of them", _keep)
FLOPS = Column(
    "FLOPs",
    "prefill FLOPs relative to the full model, those of the method included",
    _plain(lambda row: number(row.flops_ratio, ".0%")),
)
SPEEDUP = Column(
    "prefill speedup",
    "full model's prefill time ÷ this one's, with the quartiles of the paired rounds",
    _timed("prefill_speedup", ratio, "×"),
)
BREAK_EVEN = Column(
    "break-even",
    "generated tokens after which an answer takes less time than with full; unclear: the quartiles do not decide",
    _break_even,
)
ACCURACY: tuple[Column, ...] = (
    Column(
        "tokens",
        "visual tokens per question that stay after the last stage, mean",
        _plain(lambda row: number(row.tokens_after, ".4g")),
    ),
    Column(
        "on average",
        "visual tokens per question averaged over the LLM's layers: larger for methods inside the LLM",
        _plain(lambda row: number(row.tokens_average, ".4g")),
    ),
    Column("accuracy %", "with its 95 % interval", _accuracy),
    Column("to full", "points to the full model, paired by question, with the 95 % interval", _to_full),
    Column(
        "p",
        "McNemar's exact test against the full model, whole images exchanged; can exceed .05 where the interval just "
        "excludes 0, as exact tests are cautious; none for graded scores",
        _p,
    ),
    Column("Pareto", "no other row is as accurate at a lower cost: prefill FLOPs, prefill time, or both", _pareto),
)
COSTS: tuple[Column, ...] = (
    replace(TOKENS, page_only=True),  # the terminal shows both above, for the same rows
    FLOPS,
    Column(
        "prefill ms",
        "time to the first token: the median of full ÷ the median speedup",
        _timed("prefill_ms"),
        brief=True,
    ),
    SPEEDUP,
    Column("method ms", "time of the method alone; noise: not told apart from none", _method_ms, brief=True),
    BREAK_EVEN,
    Column("token ms", "time of one decoding step", _timed("decode_ms_per_token"), brief=True),
    Column(
        "decode speedup",
        "full model's time per decoding step ÷ this one's",
        _timed("decode_speedup", ratio, "×"),
        page_only=True,
    ),
    Column("peak MB", "peak of activations in prefill", _plain(lambda row: number(row.peak_activation_mb))),
    Column("KV MB", "KV cache after prefill", _plain(lambda row: number(row.kv_mb))),
)


def type_column(kind: str, samples: int) -> Column:
    """Return the column of a question type: accuracy, and below it the paired gap to the full model."""

    def cell(line: Line) -> Cell:
        score = next((score for score in line.row.types if score.type == kind), None)
        if score is None:
            return Cell(NONE)
        gap = to_full(score)
        if gap is None or line.kind == "full":
            return Cell(percent(score.accuracy), f"{percent(score.low)}–{percent(score.high)}")
        return Cell(percent(score.accuracy), f"{points(gap[0])}\n{points_interval(*gap[1:])}", lost=gap[2] < 0)

    return Column(f"{kind} (n={samples})", f"{samples} questions of type {kind}", cell)
