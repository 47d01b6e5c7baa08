"""Verdicts follow from the paired rounds, and the break-even from the verdicts."""

from dataclasses import replace

import pytest

from tokensieve.load import Cell, Outcome, break_even_sentences, grid, parse_sizes, result_of
from tokensieve.load.figures import RunFigures
from tokensieve.measure import Spread

CELL = Cell(336, 336, 16, 4, users=1)
OPEN = replace(CELL, users=None, rate=2.0)


def run(seconds, *, failures=0, tokens=4, late=0.0, count=100):
    """Return a run of requests one after the other, each of so many seconds; the first token takes half of them."""
    outcomes = [
        Outcome(
            planned=number * seconds,
            sent=number * seconds + late,
            first=(number + 0.5) * seconds,
            last=(number + 1) * seconds,
            end=(number + 1) * seconds,
            tokens=tokens,
            prompt_tokens=100,
            failure="HTTP 500" if number < failures else None,
        )
        for number in range(count)
    ]
    return RunFigures.of(outcomes)


def test_figures_of_a_run():
    figures = run(0.5)
    assert figures.requests_per_second == pytest.approx(2)
    assert figures.output_tokens_per_second == pytest.approx(8)
    assert figures.first_token_ms == pytest.approx(250)
    assert figures.token_ms == pytest.approx(250 / 3)
    assert (figures.request_ms, figures.request_p95_ms) == (pytest.approx(500), pytest.approx(500))
    assert (figures.prompt_tokens, figures.output_tokens) == (100, 4)


def test_medians_and_95th_percentiles():
    outcomes = [Outcome(0, 0, k, k, k, 1, None, None) for k in range(101)]
    figures = RunFigures.of(outcomes)
    assert (figures.first_token_ms, figures.first_token_p95_ms) == (50_000, 95_000)
    assert (figures.token_ms, figures.prompt_tokens) == (None, None)


@pytest.mark.parametrize("cell", [CELL, OPEN])
@pytest.mark.parametrize(
    ("reduced", "verdict"),
    [
        ([0.5, 0.6, 0.5, 0.6, 0.5], "pays"),
        ([1.5, 1.6, 1.5, 1.6, 1.5], "does not pay"),
        ([0.9, 1.1, 0.9, 1.1, 1.0], "not told apart"),
        ([0.5, 0.6, 0.5, 0.6], "not told apart"),  # four rounds have no spread
    ],
)
def test_a_verdict_needs_its_quartiles_on_one_side(cell, reduced, verdict):
    row = result_of(cell, [run(1.0)] * len(reduced), [run(seconds) for seconds in reduced])
    assert row.verdict == verdict
    assert row.rounds == len(reduced)
    expected = Spread.of([1 / seconds for seconds in reduced])
    for ratio in (row.throughput, row.first_token, row.token, row.request):
        assert (ratio.median, ratio.low, ratio.high) == pytest.approx((expected.median, expected.low, expected.high))


def test_ratios_are_paired_by_round():
    """Full and reduced get slower together: the ratio of each round is 2."""
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    row = result_of(CELL, [run(seconds) for seconds in drift], [run(seconds / 2) for seconds in drift])
    assert (row.throughput.low, row.throughput.median, row.throughput.high) == pytest.approx((2, 2, 2))


def test_an_open_loop_is_decided_by_the_time_of_a_request():
    """The rate is given there: equal rates with half the waiting pay."""
    full = [replace(run(1.0), requests_per_second=2.0)] * 5
    reduced = [replace(run(0.5), requests_per_second=2.0)] * 5
    assert result_of(OPEN, full, reduced).verdict == "pays"
    assert result_of(CELL, full, reduced).verdict == "not told apart"


def test_failures_decide_over_rates():
    """A side that fails one request in ten has done less work: no ratio says anything."""
    row = result_of(CELL, [run(1.0)] * 5, [run(0.1, failures=10)] * 5)
    assert row.verdict == "failed"
    assert row.reduced.failures == {"HTTP 500": 50}
    assert row.reduced.failed_share == pytest.approx(0.1)
    assert row.notes == ["reduced: 10.0% of the requests failed (HTTP 500: 50)"]
    few = result_of(CELL, [run(1.0)] * 5, [run(0.1, failures=1)] * 5)
    assert few.verdict == "pays"
    assert few.notes == ["reduced: 1.0% of the requests failed (HTTP 500: 5)"]


def test_a_side_without_any_reply_has_no_ratio():
    row = result_of(CELL, [run(1.0)] * 5, [run(0.1, failures=100)] * 5)
    assert (row.verdict, row.throughput, row.first_token, row.reduced.first_token_ms) == ("failed", None, None, None)


def test_short_replies_and_late_starts_are_noted():
    row = result_of(CELL, [run(1.0)] * 5, [run(0.5, tokens=3)] * 5)
    assert row.verdict == "not told apart"
    assert row.notes == [
        "reduced: 3 tokens a reply in the mean, of 4 asked for",
        "the replies of the sides differ in length, so their rates and times are of different work",
    ]
    assert result_of(CELL, [run(1.0, tokens=3)] * 5, [run(0.5, tokens=3)] * 5).verdict == "pays"
    (note,) = result_of(CELL, [run(1.0)] * 5, [run(1.0, late=0.1)] * 5).notes
    assert note == "reduced: the load generator started requests up to 100 ms late"


def test_tokens_that_arrive_together_have_no_time():
    row = result_of(CELL, [run(1.0)] * 5, [run(1.0)] * 4 + [replace(run(1.0), token_ms=0.006)])
    assert row.token is None
    assert row.first_token is not None
    assert row.notes == ["in a round, all tokens of a reply arrived together: ms/token says nothing"]


def row(size, verdict, tokens=16, users=1):
    base = result_of(CELL, [run(1.0)] * 5, [run(1.0)] * 5)
    return replace(base, cell=Cell(size, size, 16, tokens, users=users), verdict=verdict)


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        (["does not pay", "pays", "pays"], "pays from 448 px on"),
        (["pays", "not told apart", "pays"], "pays from 672 px on"),
        (["pays", "pays", "pays"], "pays at every measured size (224 px on)"),
        (["pays", "pays", "does not pay"], "is not shown to pay up to 672 px"),
        (["does not pay"] * 3, "pays at no measured size"),
        (["pays", "pays", "failed"], "is not shown to pay up to 672 px"),
    ],
)
def test_the_break_even_is_the_smallest_size_from_which_all_pay(verdicts, sentence):
    rows = [row(size, verdict) for size, verdict in zip((224, 448, 672), verdicts, strict=True)]
    assert break_even_sentences(rows[::-1]) == [f"{sentence} at 1 user, 16 words and 16 output tokens"]


def test_columns_with_the_same_break_even_share_a_sentence():
    rows = [row(224, "pays", tokens, users) for tokens in (16, 128) for users in (1, 8)]
    rows[-1] = replace(rows[-1], verdict="does not pay")
    assert break_even_sentences(rows) == [
        "pays at 224 px, the only size measured, at 1 user, 16 words and 16 output tokens; "
        "8 users, 16 words and 16 output tokens; 1 user, 16 words and 128 output tokens",
        "pays at no measured size at 8 users, 16 words and 128 output tokens",
    ]


def test_the_grid_has_every_combination_once_by_size():
    cells = grid(parse_sizes("672, 336, 100x200,336"), [1, 2], [3], [4], [5.0])
    assert len(cells) == len(set(cells)) == 3 * 2 * 2
    assert [cell.size for cell in cells[:3]] == ["100x200", "336", "672"]
    assert {cell.load for cell in cells} == {"4 users", "5 a second"}
    assert str(cells[0]) == "100x200 px, 1 words, 3 tokens, 4 users"
