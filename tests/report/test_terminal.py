"""The tables of ``compare`` in the terminal: the decision above, nothing cut off at 100 and at 160 columns."""

import re
import sys

import pytest

from tests.report.report_rows import Draft, results, row, unmeasured
from tokensieve.commands.compare import print_rows
from tokensieve.evaluate import Results

TIMES = {"prefill_ms": 804.0, "method_ms": 12.3, "method_ms_low": 11.0, "method_ms_high": 13.0, "kv_mb": 1234.5}
AFTER = {"break_even": "after", "break_even_tokens": 12.0, "break_even_low": 9.0, "break_even_high": 120.0}
ROWS = [
    row("full", None, 0.93, kv_mb=1234.5),
    row("fastv(layer=1)", 0.11, 0.85, tokens_average=48.25, **TIMES, break_even="not told apart"),
    row("divprune", 0.11, 0.9, **TIMES, **AFTER),
    row("random", 0.11, 0.5, seeds=5, method_ms=-0.05, method_ms_low=-0.1, method_ms_high=0.1),
    row("vtc-cls(first_layer=0, last_layer=5) + fastv(layer=8, keep=64)", 0.11, 0.6),
]


def printed(shown: Results, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a terminal of this width shows, without colours."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_rows(shown)
    return re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)


@pytest.mark.parametrize("width", [100, 160])
def test_the_tables_fit(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(results(ROWS), width, monkeypatch, capsys)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    accuracy = r"^ *divprune +11% +16 +16 +90\.0 \(86\.7–92\.6\) +−3\.0 \(−[\d.]+ to −[\d.]+\) +<\.001 +FLOPs *$"
    assert re.search(accuracy, text, re.M)
    assert re.search(r"^ *fastv\(layer=1\) +11% +16 +48\.25 ", text, re.M)  # both conventions
    costs = r"^ *divprune +11% +11% +804 +9\.00× \(8\.10–9\.90\) +12 +12 \(9–120\) +2 +0\.444 +1230 *$"
    assert re.search(costs, text, re.M)
    assert re.search(r"^ *random .* noise ", text, re.M)
    assert re.search(r"^ *fastv\(layer=1\) .* unclear ", text, re.M)


def test_the_decision_stands_above_the_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note = {"timing_note": "the times are uncertain: a busy machine"}
    drafts: list[Draft] = [*ROWS[:2], row("divprune", 0.11, 0.9, **note)]
    text = printed(results(drafts), 160, monkeypatch, capsys)
    decision, _, tables = text.partition("\n method ")
    assert "Best at 11% (16 tokens): divprune 90.0 %, −3.0 points to full" in decision
    assert "The times are uncertain: a busy machine." in decision
    assert "Every method loses accuracy against the full model" in decision
    assert "divprune" in tables


def test_nothing_measured_is_one_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(results([unmeasured(draft) for draft in ROWS]), 100, monkeypatch, capsys)
    assert text.count("─ \n") == 1
    assert "FLOPs" not in text
