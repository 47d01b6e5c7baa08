"""The page: its remarks follow from the rows, and it loads no external file."""

import errno
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.report_rows import results, row
from tokensieve.evaluate import OutputError
from tokensieve.report.html import render, write_report
from tokensieve.report.plots import curve
from tokensieve.report.remarks import remarks
from tokensieve.report.table import as_rows, label

ROWS = [row("full", None, 0.93), row("vtc-cls", 36, 0.90), row("random", 36, 0.60), row("pool", 36, 0.55)]


def remarks_text(*args: object, **kwargs: object) -> str:
    return "\n".join(remarks(as_rows(results(*args, **kwargs))))


def test_remarks_name_ties_with_random() -> None:
    assert "Below random" not in remarks_text(ROWS[:3])
    assert "Not told apart from random, as the interval of the difference holds zero: pool at 36." in remarks_text(ROWS)


def test_remarks_name_losses_to_random() -> None:
    losing = remarks_text([ROWS[0], row("vtc-cls", 36, 0.4), ROWS[2], row("pool", 36, 0.3)])
    assert ": vtc-cls at 36 (-20.0, -25.0 to -15.0), pool at 36 (-30.0, -35.0 to -25.0)." in losing


def test_remarks_name_a_missing_random_baseline() -> None:
    assert "no random baseline" in remarks_text(ROWS[:2])


def test_remarks_name_rows_without_a_comparable_random_row() -> None:
    other_budget = remarks_text([ROWS[0], row("vtc-cls", 72, 0.4), ROWS[2], row("trsm", 36, 0.9)])
    assert "did not run with about as many tokens: vtc-cls at 72." in other_budget
    assert "Below random" not in other_budget
    assert "no random baseline" not in other_budget


def test_the_page_says_which_methods_are_below_random(tmp_path: Path) -> None:
    text = render(results([ROWS[0], row("vtc-cls", 36, 0.4), ROWS[2]], folder=tmp_path), tmp_path)
    assert re.search(r"<li>Below random with about as many tokens [^<]*: vtc-cls at 36 \(-20\.0, [^<]*</li>", text)


def test_remarks_name_the_best_rows_by_question_type() -> None:
    by_type = [(0.9, 0.9), (0.9, 0.5), (0.5, 0.9), (0.4, 0.4)]
    mixed = "no single method is best on every question type: vtc-cls on colour; random on where"
    assert mixed in remarks_text(ROWS, by_type)
    assert "At 36 vtc-cls is best on every question type" in remarks_text(ROWS)


def test_remarks_name_slow_methods() -> None:
    slow = remarks_text([ROWS[0], row("trsm", 36, 0.9, prefill_speedup=0.8)])
    assert "trsm at 36 (0.80×)" in slow


def test_remarks_name_few_questions() -> None:
    assert "Only 50 questions" in remarks_text([row("full", None, 0.9, samples=50)])


def test_the_kind_of_a_row_follows_from_the_registry() -> None:
    specs = ["full", "oracle", "random(seed=3)", "pool", "downsample(keep=9)", "uniform", "vtc-cls", "my/file.py:Mine"]
    specs.append("random fine-tuned")
    kinds = [r["kind"] for r in as_rows(results([row(spec, None, 0.5) for spec in specs]))]
    assert kinds == ["full", "oracle", "random", "baseline", "baseline", "baseline", "method", "method", "method"]


def test_labels_are_written_as_by_the_user() -> None:
    budgets = [label({"method": "a", "keep": keep}) for keep in (None, 64, 0.25, 1 / 9)]
    assert budgets == ["a", "a, 64", "a, 25%", "a, 11.11%"]


@pytest.mark.parametrize("cost", ["flops_ratio", "tokens_after"])
def test_curves_are_inline_svg_with_every_method(cost: str) -> None:
    svg = curve(as_rows(results(ROWS)), cost)
    assert svg.startswith("<svg")
    for name in ("full model", "vtc-cls", "random", "pool"):
        assert f">{name}<" in svg
    assert "currentColor" in svg
    assert "http" not in svg


class Page(HTMLParser):
    """Collects what a browser would load, and checks that every tag is closed."""

    VOID = ("meta", "img", "br", "link", "use", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_self_contained_and_escapes_what_users_wrote(tmp_path: Path) -> None:
    text = render(results(ROWS, folder=tmp_path), tmp_path, command="tokensieve compare --methods '<x>'")
    page = Page(text)
    assert page.open == []
    assert len([source for source in page.loaded if source.startswith("data:image/webp;base64,")]) == len(ROWS)
    assert all(source.startswith(("data:", "#")) for source in page.loaded)
    assert not re.search(r"https?://|<script|@import|url\((?!#)", text)
    assert "what colour is &lt;b&gt;it&lt;/b&gt;?" in text
    assert "&#39;&lt;x&gt;&#39;" in text
    for words in ("vtc-cls, 36", "90.0 (86.0–93.0)", "prefers-color-scheme", 'name="viewport"', "2.13.0"):
        assert words in text


def test_pages_stay_small(tmp_path: Path) -> None:
    rows = [ROWS[0], *(row(f"method-{i}", 36, 0.5) for i in range(120))]
    assert len(render(results(rows, folder=tmp_path), tmp_path)) < 3_000_000


def test_nothing_measured_leaves_the_costs_out(tmp_path: Path) -> None:
    keys = ("flops_ratio", "prefill_ms", "prefill_speedup", "method_ms", "decode_ms_per_token", "kv_mb")
    rows = [row(r.method, r.keep, r.accuracy, **dict.fromkeys((*keys, "peak_activation_mb"))) for r in ROWS]
    text = render(results(rows), tmp_path)
    assert "Accuracy against visual tokens" in text
    assert "Accuracy against prefill FLOPs" not in text


def test_a_full_disk_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_report(results(ROWS), tmp_path)
    old = page.read_text("utf-8")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"report\.html: No space left on device; results\.json is kept"):
        write_report(results(ROWS[:2]), tmp_path)
    assert page.read_text("utf-8") == old
    assert list(tmp_path.iterdir()) == [page]


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'reports need jinja2: pip install "tokensieve\[report\]"'):
        render(results(ROWS), tmp_path)
