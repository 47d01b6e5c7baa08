"""The output of a load test: sentences, a table of rates and one of latencies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from tokensieve.commands.console import print_lines, print_table

if TYPE_CHECKING:
    from tokensieve.load import Cell, CellResult, Side
    from tokensieve.measure import Spread


def sentences(results: Sequence[CellResult], full: Side, reduced: Side) -> list[str]:
    """Return what was compared, where it pays, and the remarks on single cells."""
    from tokensieve.load import break_even_sentences
    from tokensieve.measure.paired import FEW_ROUNDS

    sides = f"full: {_description(full)}; reduced: {_description(reduced)}"
    lines = [f"Reducing {sentence}." for sentence in break_even_sentences(results)]
    if any(row.verdict == "does not pay" for row in results):
        lines.append("Where it does not pay: `tokensieve serve --from-tokens N` keeps images of fewer tokens whole.")
    fewest = min(row.rounds for row in results)
    if fewest < FEW_ROUNDS:
        lines.append(f"A verdict needs {FEW_ROUNDS} rounds of a cell; there are as few as {fewest}.")
    return [sides, *lines, *(f"{row.cell}: {remark}" for row in results for remark in row.notes)]


def _description(side: Side) -> str:
    extra = side.fields.get("mm_processor_kwargs")
    return f"{side.model} at {side.url}" + (f" with {json.dumps(extra)}" if extra else "")


def print_results(results: Sequence[CellResult], lines: Sequence[str]) -> None:
    """Print rates and verdicts in one table, latencies in another."""
    grid = ("image", "words", "tokens", "load")
    print_table(
        (*grid, "prompt", "requests/s", "tokens/s", "× requests/s", "failed", "verdict"), list(map(_rates, results))
    )
    times = ("first token ms", "×", "ms/token", "×", "request ms", "×")
    print_table((*grid, *times), list(map(_latencies, results)))
    typer.echo("full → reduced, medians of the rounds; times of the full side: median / 95th percentile")
    typer.echo("×: paired by round, median (quartiles); above 1, reduced is better")
    print_lines(lines)


def _cell(cell: Cell) -> list[str]:
    return [cell.size, str(cell.words), str(cell.output_tokens), cell.load]


def _rates(row: CellResult) -> list[str]:
    full, reduced = row.full, row.reduced
    return [
        *_cell(row.cell),
        f"{_digits(full.prompt_tokens)} → {_digits(reduced.prompt_tokens)}",
        f"{_digits(full.requests_per_second)} → {_digits(reduced.requests_per_second)}",
        f"{_digits(full.output_tokens_per_second)} → {_digits(reduced.output_tokens_per_second)}",
        ratio(row.throughput),
        f"{full.failed_share:.0%} → {reduced.failed_share:.0%}",
        row.verdict,
    ]


def _latencies(row: CellResult) -> list[str]:
    full = row.full
    return [
        *_cell(row.cell),
        f"{_digits(full.first_token_ms)} / {_digits(full.first_token_p95_ms)}",
        ratio(row.first_token),
        f"{_digits(full.token_ms)} / {_digits(full.token_p95_ms)}",
        ratio(row.token),
        f"{_digits(full.request_ms)} / {_digits(full.request_p95_ms)}",
        ratio(row.request),
    ]


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def ratio(spread: Spread | None) -> str:
    """Return a paired ratio with its quartiles, as text."""
    from tokensieve.measure import ratio_digits

    if spread is None:
        return "–"
    return f"{ratio_digits(spread.median)} ({ratio_digits(spread.low)}–{ratio_digits(spread.high)})"
