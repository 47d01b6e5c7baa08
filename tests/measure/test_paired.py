"""The figures of a row agree with each other, whatever the times were: synthetic rounds, nothing is timed."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokensieve.measure import Rounds, Spread, Timing, break_even

FEW = settings(deadline=None, derandomize=True, database=None)
times = st.floats(0.05, 5000)
speedups = st.floats(0.2, 5)


@st.composite
def sessions(draw, decode=True, minimum=5):
    """Draw the rounds of the unhooked model and of a method; some speedups are close to 1, as real ones are."""
    count = draw(st.integers(minimum, 12))
    near = st.floats(0.9, 1.1) if draw(st.booleans()) else speedups

    def rounds(elements):
        return draw(st.lists(elements, min_size=count, max_size=count))

    full, full_steps = rounds(times), rounds(times)
    method = [t / s for t, s in zip(full, rounds(near), strict=True)]
    steps = [t / s for t, s in zip(full_steps, rounds(near), strict=True)]
    replay = [t * share for t, share in zip(method, rounds(st.floats(0.3, 1.1)), strict=True)]
    if not decode:
        return Rounds(full), Rounds(method, None, replay)
    return Rounds(full, full_steps), Rounds(method, steps, replay)


def ordered(spread):
    return spread.low <= spread.median <= spread.high


def answer_ms(row, tokens):
    return row.prefill_ms.median + tokens * row.decode_ms_per_token.median


# full 26.1 ms and 3.32 ms per token, the method 26.3 ms, 0.94x and 3.89 ms: break-even was 1.116 tokens
ONE_SLOW_START = (
    Rounds([26.1] * 6 + [24.7] * 4, [3.32] * 10),
    Rounds([26.3] * 10, [3.89] * 10, [25.0] * 10),
)


@FEW
@given(sessions())
@example(ONE_SLOW_START)
def test_the_times_of_a_row_and_its_speedups_are_one_arithmetic(session):
    full_rounds, method_rounds = session
    full, row = Timing.of_full(full_rounds), Timing.of_method(full_rounds, method_rounds)
    for name, speedup in (("prefill_ms", row.prefill_speedup), ("decode_ms_per_token", row.decode_speedup)):
        reference, spread = getattr(full, name).median, getattr(row, name)
        assert ordered(spread)
        assert ordered(speedup)
        assert spread.median * speedup.median == pytest.approx(reference)
        assert spread.low * speedup.high == pytest.approx(reference)
        assert spread.high * speedup.low == pytest.approx(reference)
    assert ordered(row.method_ms)
    assert row.method_ms.median < row.prefill_ms.median


@FEW
@given(sessions())
@example(ONE_SLOW_START)
def test_the_break_even_is_never_denied_by_the_times_beside_it(session):
    full_rounds, method_rounds = session
    full, row = Timing.of_full(full_rounds), Timing.of_method(full_rounds, method_rounds)
    few, many = 1e-3, 1e9
    if row.break_even == "at once":
        assert row.break_even_tokens == row.break_even_low == row.break_even_high == 0
        assert row.prefill_ms.high < full.prefill_ms.median
        assert answer_ms(row, many) < answer_ms(full, many) * (1 + 1e-9)
    elif row.break_even == "after":
        tokens = row.break_even_tokens
        assert 0 < row.break_even_low <= tokens
        assert row.break_even_high is None or tokens <= row.break_even_high
        assert answer_ms(row, tokens) == pytest.approx(answer_ms(full, tokens))
        assert answer_ms(row, 0) > answer_ms(full, 0)
        assert row.decode_ms_per_token.high < full.decode_ms_per_token.median
    elif row.break_even == "never":
        assert row.break_even_tokens is row.break_even_low is row.break_even_high is None
        assert row.prefill_ms.low > full.prefill_ms.median
        assert answer_ms(row, few) > answer_ms(full, few)
        assert answer_ms(row, many) >= answer_ms(full, many) * (1 - 1e-9)
    else:
        assert row.break_even == "not told apart"
        assert row.break_even_tokens is None
        prefill, decode = row.prefill_speedup, row.decode_speedup
        straddles = prefill.low <= 1 <= prefill.high or decode.low <= 1 <= decode.high
        the_length_decides = prefill.low > 1 and decode.high < 1
        assert straddles or the_length_decides


@FEW
@given(sessions(), st.floats(0.1, 10))
def test_a_machine_that_is_slower_throughout_changes_no_ratio(session, factor):
    slower = [
        Rounds(*([t * factor for t in part] if part else None for part in (r.prefill, r.decode, r.replay)))
        for r in session
    ]
    row, slow = Timing.of_method(*session), Timing.of_method(*slower)
    for name in ("prefill_speedup", "decode_speedup"):
        for part in ("median", "low", "high"):
            assert getattr(getattr(slow, name), part) == pytest.approx(getattr(getattr(row, name), part))
    for name in ("prefill_ms", "method_ms"):
        expected = factor * getattr(row, name).median
        assert getattr(slow, name).median == pytest.approx(expected, rel=1e-9, abs=1e-9 * slow.prefill_ms.median)


@FEW
@given(sessions(), st.integers(0, 4), st.floats(2, 1000))
def test_a_slow_round_that_hits_all_candidates_changes_no_speedup(session, hit, factor):
    full, method = session

    def slowed(values):
        return [t * factor if i == hit else t for i, t in enumerate(values)]

    disturbed = Rounds(slowed(full.prefill), full.decode), Rounds(slowed(method.prefill), method.decode)
    before, after = Timing.of_method(*session).prefill_speedup, Timing.of_method(*disturbed).prefill_speedup
    assert (after.low, after.median, after.high) == pytest.approx((before.low, before.median, before.high))


@FEW
@given(sessions(decode=False))
def test_a_model_that_does_not_generate_has_no_break_even(session):
    row = Timing.of_method(*session)
    assert (row.decode_ms_per_token, row.decode_speedup, row.break_even, row.break_even_tokens) == (None,) * 4
    assert row.prefill_ms.median > 0


@FEW
@given(sessions(minimum=1))
def test_the_unhooked_model_is_its_own_reference(session):
    full = Timing.of_full(session[0])
    assert full.prefill_ms == Spread.of(session[0].prefill)
    assert full.prefill_speedup == full.decode_speedup == Spread(1, 1, 1)
    assert full.method_ms is full.break_even is full.break_even_tokens is None


def test_the_slow_row_of_the_old_table_never_pays():
    row = Timing.of_method(*ONE_SLOW_START)
    assert row.break_even == "never"
    assert row.break_even_tokens is None


FAST, SLOW, UNSURE = Spread(1.25, 1.2, 1.3), Spread(0.8, 0.75, 0.85), Spread(1.0, 0.9, 1.1)


@pytest.mark.parametrize(
    ("prefill", "decode", "verdict"),
    [
        (FAST, FAST, ("at once", 0, 0, 0)),
        (FAST, UNSURE, ("at once", 0, 0, 0)),
        # 100 / 0.8 - 100 = 25 ms more, 10 - 10 / 1.25 = 2 ms less per token
        (SLOW, FAST, ("after", 12.5, pytest.approx(17.647 / 2.3077, rel=1e-4), pytest.approx(33.333 / 1.6667, 1e-4))),
        (SLOW, SLOW, ("never", None, None, None)),
        (SLOW, Spread(1, 1, 1), ("never", None, None, None)),
        (SLOW, UNSURE, ("not told apart", None, pytest.approx(17.647 / 0.90909, rel=1e-4), None)),
        (UNSURE, FAST, ("not told apart", None, 0, pytest.approx(11.111 / 1.6667, rel=1e-4))),
        (UNSURE, UNSURE, ("not told apart", None, 0, None)),
        (UNSURE, SLOW, ("not told apart", None, None, None)),
        (FAST, SLOW, ("not told apart", None, None, None)),  # ahead of short answers, behind long ones
        (FAST, Spread(0.98, 0.95, 1.01), ("not told apart", None, 0, None)),
    ],
)
def test_break_even(prefill, decode, verdict):
    assert break_even(100, prefill, 10, decode) == verdict


def test_few_rounds_tell_nothing_apart():
    few = Rounds([10.0] * 4, [2.0] * 4), Rounds([5.0] * 4, [1.0] * 4)
    assert Timing.of_method(*few).break_even == "not told apart"
    more = Rounds([10.0] * 5, [2.0] * 5), Rounds([5.0] * 5, [1.0] * 5)
    assert Timing.of_method(*more).break_even == "at once"


def test_the_time_of_a_method_is_its_share_of_the_printed_prefill():
    full, method = Rounds([10.0] * 8), Rounds([8.0] * 8, None, [6.0, 6.0, 6.0, 6.0, 7.2, 7.2, 7.2, 7.2])
    row = Timing.of_method(full, method)
    assert (row.prefill_ms.median, row.method_ms.low, row.method_ms.high) == pytest.approx((8, 0.8, 2))
    noisy = Timing.of_method(full, Rounds([8.0] * 8, None, [7.0, 9.0] * 4))
    assert noisy.method_ms.low < 0 < noisy.method_ms.high
