"""Figures of a run, of a cell over its paired rounds, and the sentences that name the break-even."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from tokensieve.load.cells import Cell
from tokensieve.load.traffic import Outcome
from tokensieve.measure import Spread, paired_ratio
from tokensieve.measure.paired import FEW_ROUNDS

Verdict: TypeAlias = Literal["pays", "does not pay", "not told apart", "failed"]

FAILED_SHARE = 0.01  # of a side's requests: from more failures on, a rate compares different work
LENGTHS = 0.05  # difference of the mean reply lengths: from more on, the sides do different work
LATE = 0.05  # of the time to the first token: a load generator that sends later than this measures itself

TOGETHER_MS = 0.1  # per token: no LLM is that fast, so several tokens were read at once


@dataclass(frozen=True)
class RunFigures:
    """Figures of one side in one round. Latencies in milliseconds, over the requests that succeeded.

    Attributes:
        requests: sent.
        failures: number by kind.
        requests_per_second, output_tokens_per_second: of the requests that succeeded.
        first_token_ms, first_token_p95_ms: median and 95th percentile of the time to the first token.
        token_ms, token_p95_ms: of the time per token after the first; ``None`` if no reply had two tokens.
        request_ms, request_p95_ms: of the whole request.
        prompt_tokens: median; ``None`` where the server sends no usage.
        output_tokens: mean.
        late_ms: 95th percentile of the delay between a planned start and the start in fact.
    """

    requests: int
    failures: Mapping[str, int]
    requests_per_second: float
    output_tokens_per_second: float
    first_token_ms: float | None
    first_token_p95_ms: float | None
    token_ms: float | None
    token_p95_ms: float | None
    request_ms: float | None
    request_p95_ms: float | None
    prompt_tokens: float | None
    output_tokens: float | None
    late_ms: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> RunFigures:
        """Return the figures of a run. Its time lasts from the start to the end of the last request."""
        good = [outcome for outcome in outcomes if outcome.failure is None]
        seconds = max(outcome.end for outcome in outcomes)
        first = [1e3 * s for o in good if (s := o.first_token_seconds) is not None]
        token = [1e3 * s for o in good if (s := o.seconds_per_token) is not None]
        whole = [1e3 * o.seconds for o in good]
        prompts = [o.prompt_tokens for o in good if o.prompt_tokens is not None]
        return cls(
            requests=len(outcomes),
            failures=dict(Counter(o.failure for o in outcomes if o.failure is not None)),
            requests_per_second=len(good) / seconds,
            output_tokens_per_second=sum(o.tokens for o in good) / seconds,
            first_token_ms=_percentile(first, 50),
            first_token_p95_ms=_percentile(first, 95),
            token_ms=_percentile(token, 50),
            token_p95_ms=_percentile(token, 95),
            request_ms=_percentile(whole, 50),
            request_p95_ms=_percentile(whole, 95),
            prompt_tokens=_percentile(prompts, 50),
            output_tokens=float(np.mean([o.tokens for o in good])) if good else None,
            late_ms=_percentile([1e3 * (o.sent - o.planned) for o in outcomes], 95) or 0.0,
        )


@dataclass(frozen=True)
class SideFigures:
    """Medians over the rounds of one side; the failures of all rounds together."""

    requests_per_second: float
    output_tokens_per_second: float
    first_token_ms: float | None
    first_token_p95_ms: float | None
    token_ms: float | None
    token_p95_ms: float | None
    request_ms: float | None
    request_p95_ms: float | None
    prompt_tokens: float | None
    output_tokens: float | None
    late_ms: float
    failures: Mapping[str, int]
    failed_share: float

    @classmethod
    def of(cls, runs: Sequence[RunFigures]) -> SideFigures:
        """Return the medians of the runs."""
        failures: Counter[str] = Counter()
        for run in runs:
            failures.update(run.failures)
        names = cls.__dataclass_fields__.keys() - {"failures", "failed_share"}
        medians: dict[str, Any] = {name: _percentile([getattr(run, name) for run in runs], 50) for name in names}
        share = sum(failures.values()) / sum(run.requests for run in runs)
        return cls(**medians, failures=dict(failures), failed_share=share)


@dataclass(frozen=True)
class CellResult:
    """One row of the table. Ratios are paired by round; above 1, the reduced side is better.

    Attributes:
        rounds: behind the ratios.
        throughput: requests per second, reduced ÷ full.
        first_token, token, request: times, full ÷ reduced; ``None`` where a side has none.
        verdict: from the throughput in a closed loop, and from the time of a request in an open one, where the rate is
            given. "pays" and "does not pay" need the quartiles on one side of 1, and five rounds.
        notes: sentences on what makes the row doubtful.
    """

    cell: Cell
    rounds: int
    full: SideFigures
    reduced: SideFigures
    throughput: Spread | None
    first_token: Spread | None
    token: Spread | None
    request: Spread | None
    verdict: Verdict
    notes: Sequence[str] = ()


def result_of(cell: Cell, full: Sequence[RunFigures], reduced: Sequence[RunFigures]) -> CellResult:
    """Return the row of a cell from the runs of its rounds; the n-th of both sides are a pair."""
    sides = {"full": SideFigures.of(full), "reduced": SideFigures.of(reduced)}
    throughput, request = _ratio(reduced, full, "requests_per_second"), _ratio(full, reduced, "request_ms")
    verdict = _verdict(throughput if cell.rate is None else request, len(full))
    lengths = [side.output_tokens or 0.0 for side in sides.values()]
    if differ := max(lengths) - min(lengths) > LENGTHS * max(lengths):
        verdict = "not told apart"
    if max(side.failed_share for side in sides.values()) > FAILED_SHARE:
        verdict = "failed"
    return CellResult(
        cell,
        len(full),
        sides["full"],
        sides["reduced"],
        throughput=throughput,
        first_token=_ratio(full, reduced, "first_token_ms"),
        token=None if _together([*full, *reduced]) else _ratio(full, reduced, "token_ms"),
        request=request,
        verdict=verdict,
        notes=[
            *(note for name, side in sides.items() for note in _notes(name, side, cell)),
            *(["the replies of the sides differ in length, so their rates and times are of different work"] * differ),
            *(
                ["in a round, all tokens of a reply arrived together: ms/token says nothing"]
                * _together([*full, *reduced])
            ),
        ],
    )


def break_even_sentences(results: Sequence[CellResult]) -> list[str]:
    """Return where reducing pays: for each load, prompt and output length the smallest image size from which it pays.

    It pays from a size on if it pays at this and at every larger size that was measured.
    """
    columns: dict[str, list[CellResult]] = defaultdict(list)
    for result in results:
        cell = result.cell
        tokens = "1 output token" if cell.output_tokens == 1 else f"{cell.output_tokens} output tokens"
        columns[f"{cell.load}, {_words(cell)} and {tokens}"].append(result)
    by_threshold: dict[str, list[str]] = defaultdict(list)
    for column, rows in columns.items():
        by_threshold[_threshold(rows)].append(column)
    return [f"{threshold} at {'; '.join(names)}" for threshold, names in by_threshold.items()]


def _words(cell: Cell) -> str:
    return "1 word" if cell.words == 1 else f"{cell.words} words"


def _threshold(rows: Sequence[CellResult]) -> str:
    ordered = sorted(rows, key=lambda row: row.cell.width * row.cell.height)
    paying = 0
    for row in reversed(ordered):
        if row.verdict != "pays":
            break
        paying += 1
    if paying:
        smallest = ordered[-paying].cell.size
        if len(ordered) == 1:
            return f"pays at {smallest} px, the only size measured,"
        everywhere = paying == len(ordered)
        return f"pays at every measured size ({smallest} px on)" if everywhere else f"pays from {smallest} px on"
    if all(row.verdict == "does not pay" for row in ordered):
        return "pays at no measured size"
    return f"is not shown to pay up to {ordered[-1].cell.size} px"


def _verdict(ratio: Spread | None, rounds: int) -> Verdict:
    if ratio is None or rounds < FEW_ROUNDS or ratio.low <= 1 <= ratio.high:
        return "not told apart"
    return "pays" if ratio.low > 1 else "does not pay"


def _notes(name: str, side: SideFigures, cell: Cell) -> list[str]:
    notes = []
    if side.failures:
        kinds = ", ".join(f"{kind}: {number}" for kind, number in sorted(side.failures.items()))
        notes.append(f"{name}: {side.failed_share:.1%} of the requests failed ({kinds})")
    if side.output_tokens is not None and side.output_tokens < 0.99 * cell.output_tokens:
        notes.append(f"{name}: {side.output_tokens:.3g} tokens a reply in the mean, of {cell.output_tokens} asked for")
    if side.first_token_ms is not None and side.late_ms > LATE * side.first_token_ms:
        notes.append(f"{name}: the load generator started requests up to {side.late_ms:.3g} ms late")
    return notes


def _together(runs: Sequence[RunFigures]) -> bool:
    """Return whether the tokens of a run arrived too fast to be single ones."""
    return any(run.token_ms is not None and run.token_ms < TOGETHER_MS for run in runs)


def _ratio(over: Sequence[RunFigures], under: Sequence[RunFigures], name: str) -> Spread | None:
    """Return the paired ratio of a figure; ``None`` if a run has none, or has no request that succeeded."""
    above, below = ([getattr(run, name) for run in runs] for runs in (over, under))
    if not above or not all(above) or not all(below):
        return None
    return paired_ratio(above, below)


def _percentile(values: Sequence[float | None], percent: float) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.percentile(numbers, percent)) if numbers else None
