"""The tables of ``bench``: their figures agree with each other as they are printed, at 120 columns."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokensieve.commands.bench import _rates, _sizes, _times, print_tables
from tokensieve.commands.loading import note_crowd
from tokensieve.measure import Cost, Rounds, Spread, Timing
from tokensieve.measure.paired import FEW_ROUNDS

FEW = settings(deadline=None, derandomize=True, database=None)
COUNTS = {"tokens_before": 144.0, "prompts": 1, "flops": 10, "peak_activation_bytes": 10**6, "kv_bytes": 10**6}
NUMBER = r"-?\d+(?:\.\d+)?"


def cost(method, timing, **changes):
    return Cost(**{"method": method, "tokens_after": 36.0, "flops_ratio": 0.69, **COUNTS, **vars(timing), **changes})


def rows(full, method):
    return cost("full", Timing.of_full(full)), cost("pool", Timing.of_method(full, method))


def numbers(cell):
    """Return the numbers of a cell: one, or a median with its quartiles."""
    return [float(text) for text in re.findall(NUMBER, cell.replace("∞", "1e99"))]


@st.composite
def sessions(draw):
    count = draw(st.integers(FEW_ROUNDS, 10))

    def rounds(low, high):
        return draw(st.lists(st.floats(low, high), min_size=count, max_size=count))

    full, steps = rounds(5, 2000), rounds(1, 50)
    low, high = draw(st.sampled_from([(0.3, 0.99), (0.95, 1.05), (1.01, 3.0), (0.5, 2.0)]))
    method = [a / b for a, b in zip(full, rounds(low, high), strict=True)]
    low, high = draw(st.sampled_from([(0.3, 0.99), (0.95, 1.05), (1.01, 3.0), (0.5, 2.0)]))
    slower = [a / b for a, b in zip(steps, rounds(low, high), strict=True)]
    replay = [a * b for a, b in zip(method, rounds(0.5, 1.05), strict=True)]
    return Rounds(full, steps), Rounds(method, slower, replay)


@FEW
@given(sessions())
def test_printed_figures_agree_up_to_their_last_digit(session):
    full, row = rows(*session)
    full_cells, cells = _times(full), _times(row)
    for time_column, speedup_column in ((2, 3), (4, 5)):
        reference, time = numbers(full_cells[time_column])[0], numbers(cells[time_column])[0]
        speedup, low, high = numbers(cells[speedup_column])
        assert low <= speedup <= high
        assert time * speedup == pytest.approx(reference, rel=0.16)  # each of the three is rounded to two digits


@FEW
@given(sessions())
def test_a_printed_verdict_stands_beside_figures_that_show_it(session):
    _, row = rows(*session)
    *_, break_even = _times(row)
    _, prefill_low, prefill_high = numbers(_times(row)[3])
    decode, decode_low, decode_high = numbers(_times(row)[5])
    exact = 6e-4  # a speedup of 1.0004 is printed as 1.0
    if break_even == "at once":
        assert prefill_low > 1 or row.prefill_speedup.low < 1 + exact
        assert decode >= 1
    elif break_even == "never":
        assert prefill_high < 1 or row.prefill_speedup.high > 1 - exact
        assert decode_high <= 1
    elif break_even != "not told apart":
        assert prefill_high < 1 or row.prefill_speedup.high > 1 - exact
        assert decode_low > 1 or row.decode_speedup.low < 1 + exact
        assert numbers(break_even)[0] > 0


@FEW
@given(sessions(), st.integers(0, 500))
def test_requests_follow_from_the_printed_times(session, answer_tokens):
    full, row = rows(*session)
    rates = _rates(row, answer_tokens)
    by_hand = row.prefill_ms.median + answer_tokens * row.decode_ms_per_token.median
    assert rates["seconds_per_1000_requests"]["median"] == pytest.approx(by_hand)
    assert rates["prompts_per_second"] * row.prefill_ms.median == pytest.approx(1000)
    whole = full.prefill_ms.median + answer_tokens * full.decode_ms_per_token.median
    requests, share = row.request_seconds(answer_tokens), _sizes(row, full, answer_tokens)[-1]
    if requests.low < whole < requests.high:
        assert share == "within noise"
    else:
        assert numbers(share)[0] == pytest.approx(100 * by_hand / whole, rel=0.06)
    assert _sizes(full, full, answer_tokens)[-1] == "100%"


def test_a_cost_that_noise_hides_is_not_a_number():
    full = Rounds([10.0] * 8, [1.0] * 8)
    hidden = rows(full, Rounds([8.0] * 8, [1.0] * 8, [7.0, 9.0] * 4))
    assert _sizes(hidden[1], hidden[0], 64)[1] == "within noise"
    assert hidden[1].to_json()["method_ms"]["low"] < 0
    negative = rows(full, Rounds([8.0] * 8, [1.0] * 8, [8.5] * 8))
    assert _sizes(negative[1], negative[0], 64)[1] == "within noise"
    clear = rows(full, Rounds([8.0] * 8, [1.0] * 8, [6.0] * 8))
    assert _sizes(clear[1], clear[0], 64)[1] == "2.0 (2.0–2.0)"


def test_the_row_that_is_slower_in_both_never_pays():
    full, row = rows(Rounds([26.1] * 10, [3.32] * 10), Rounds([26.3] * 10, [3.89] * 10, [25.0] * 10))
    assert _times(full) == ["full", "36", "26 (26–26)", "–", "3.3 (3.3–3.3)", "–", "–"]
    assert _times(row) == ["pool", "36", "26", "0.99× (0.99–0.99)", "3.9", "0.85× (0.85–0.85)", "never"]


def test_a_classifier_has_no_decoding():
    full, row = rows(Rounds([10.0] * 8), Rounds([8.0] * 8))
    assert _times(row)[4:] == ["–"] * 3
    assert _sizes(row, full, 64)[6] == "–"
    assert _rates(row, 64)["tokens_per_second"] is None
    assert _rates(row, 64)["seconds_per_1000_requests"]["median"] == pytest.approx(8)


def test_batches_raise_the_throughput():
    timing = Timing.of_full(Rounds([80.0] * 8, [4.0] * 8))
    batch = cost("full", timing, prompts=8)
    assert (batch.prompts_per_second, batch.tokens_per_second) == pytest.approx((100, 2000))
    assert batch.request_seconds(10).median == pytest.approx((80 + 10 * 4) / 8)


def test_the_tables_fit_120_columns(capsys, monkeypatch):
    """On a terminal the method's name folds; no figure is cut."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    wide = Spread(1234.5, 1111.0, 1456.0)
    slow = {
        "prefill_speedup": Spread(0.9861, 0.9721, 0.9961),
        "decode_speedup": Spread(1.0361, 1.0211, 1.0451),
        "method_ms": Spread(0.0123, 0.0111, 0.0135),
        "break_even": "after",
        "break_even_tokens": 1234.0,
        "break_even_low": 1111.0,
        "break_even_high": 1456.0,
    }
    timing = Timing(wide, Spread(1, 1, 1), None, wide, Spread(1, 1, 1))
    full = cost("full", timing, peak_activation_bytes=123456 * 10**6, kv_bytes=12345 * 10**6)
    spec = "vtc-cls(keep=0.11) + fastv(layer=2, keep=0.05)"
    row = cost(spec, timing, **slow, peak_activation_bytes=123456 * 10**6)
    print_tables([full, row], 64)
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # bold headers
    assert max(map(len, out.splitlines())) <= 120
    assert "…" not in out
    for cell in [*_times(full)[1:], *_times(row)[1:], *_sizes(full, full, 64)[1:], *_sizes(row, full, 64)[1:]]:
        assert cell in out
    assert "64 tokens after the first" in out


@pytest.mark.parametrize(("device", "noted"), [("cpu", "note: crowded\n"), ("cuda", "")])
def test_shared_cores_are_noted_on_stderr_before_the_work(capsys, monkeypatch, device, noted):
    monkeypatch.setattr("tokensieve.measure.crowd_note", lambda threads, cores, quota: "crowded")
    note_crowd(SimpleNamespace(device=torch.device(device), get_input_embeddings=lambda: None))
    assert capsys.readouterr() == ("", noted)
