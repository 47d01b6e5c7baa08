"""Remarks of the report about its own rows: losses to random, ties, slow methods, few questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokensieve.evaluate import VsRandom
from tokensieve.report.table import Row, budget

FEW = 200


def remarks(rows: Sequence[Row]) -> list[str]:
    """Return plain sentences, each computed from the rows."""
    return [*_against_random(rows), *_by_type(rows), *_speed(rows), *_samples(rows)]


def _against_random(rows: Sequence[Row]) -> Iterator[str]:
    """Name the rows below random, or not told apart from it, by the interval of the difference paired by question."""
    random_ran = any(row["kind"] == "random" for row in rows)
    rows = [row for row in rows if row["kind"] in ("method", "baseline")]
    compared = [(row, row["chance"]) for row in rows if row["chance"] is not None]
    not_compared = [row for row in rows if row["chance"] is None and row["kind"] == "method"]
    if not_compared and not random_ran:
        yield "There is no random baseline in this run, so nothing here shows that a method chooses well."
    elif not_compared:
        yield f"Not compared with random, which did not run with about as many tokens: {_list(not_compared)}."
    lost = [f"{_named(row)} ({_points(chance)})" for row, chance in compared if chance.lost]
    if lost:
        yield f"Below random with about as many tokens (points, with their paired 95 % interval): {', '.join(lost)}."
    ties = [row for row, chance in compared if not chance.lost and not chance.won]
    if ties:
        yield f"Not told apart from random, as the interval of the difference holds zero: {_list(ties)}."


def _points(chance: VsRandom) -> str:
    return f"{100 * chance.difference:+.1f}, {100 * chance.low:+.1f} to {100 * chance.high:+.1f}"


def _list(rows: Sequence[Row]) -> str:
    return ", ".join(map(_named, rows))


def _by_type(rows: Sequence[Row]) -> Iterator[str]:
    """Name the best rows on each question type, at each budget that at least two rows share."""
    ranked = [row for row in rows if row["kind"] not in ("full", "oracle") and row["by_type"]]
    for keep in dict.fromkeys(str(row["keep"]) for row in ranked):
        group = [row for row in ranked if str(row["keep"]) == keep]
        if len(group) < 2:
            continue
        kinds = list(group[0]["by_type"])
        best = {kind: max(row["by_type"].get(kind, 0.0) for row in group) for kind in kinds}
        leads = {row["method"]: [kind for kind in kinds if row["by_type"].get(kind) == best[kind]] for row in group}
        everywhere = [method for method, led in leads.items() if len(led) == len(kinds)]
        if len(everywhere) == 1:
            yield f"At {budget(group[0])} {everywhere[0]} is best on every question type."
        elif not everywhere:
            led = "; ".join(f"{method} on {', '.join(led)}" for method, led in leads.items() if led)
            yield f"At {budget(group[0])} no single method is best on every question type: {led}."


def _speed(rows: Sequence[Row]) -> Iterator[str]:
    slow = [
        f"{_named(row)} ({row['prefill_speedup']:.2f}×)"
        for row in rows
        if row["kind"] != "full" and row["prefill_speedup"] is not None and row["prefill_speedup"] < 1
    ]
    if slow:
        yield f"Costs more prefill time than it saves on this model and machine: {', '.join(slow)}."


def _samples(rows: Sequence[Row]) -> Iterator[str]:
    fewest = min((row["samples"] for row in rows), default=FEW)
    if fewest < FEW:
        yield f"Only {fewest} questions: the intervals are wide, and differences of a few points mean nothing."


def _named(row: Row) -> str:
    return f"{row['method']} at {budget(row)}"
