"""The page and its plots: it shows the decision first, and loads no external file."""

import errno
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.report_rows import results, row, unmeasured
from tokensieve.evaluate import OutputError, Skipped
from tokensieve.evaluate.kinds import baseline_methods, kind_of
from tokensieve.evaluate.rows import label
from tokensieve.report.decision import Decision
from tokensieve.report.html import render, write_report
from tokensieve.report.plots import COLOURS, curve, saved_ms, time_saved
from tokensieve.report.table import Cost

ROWS = [row("full", None, 0.93), row("vtc-cls", 36, 0.90), row("random", 36, 0.60), row("pool", 36, 0.55)]


def decision(**options: object) -> Decision:
    return Decision(results(ROWS, **options))


def test_the_kind_of_a_row_follows_from_the_registry() -> None:
    specs = ["full", "oracle", "random(seed=3)", "pool", "downsample(keep=9)", "uniform", "vtc-cls", "my/file.py:Mine"]
    specs += ["random fine-tuned", "downsample(keep=0.5) + divprune(keep=9)", "blind"]
    kinds = [kind_of(spec, baseline_methods()) for spec in specs]
    assert kinds[:6] == ["full", "oracle", "random", "baseline", "baseline", "baseline"]
    assert kinds[6:] == ["method", "method", "method", "method", "blind"]


def test_labels_are_written_as_by_the_user() -> None:
    budgets = [label("a", keep) for keep in (None, 64, 0.25, 1 / 9)]
    assert budgets == ["a", "a at 64", "a at 25%", "a at 11.11%"]


# -- plots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["flops_ratio", "prefill_ms", "tokens_average"])
def test_curves_are_inline_svg_with_every_method(cost: Cost) -> None:
    svg = curve(decision(), cost)
    assert svg.startswith("<svg")
    for name in ("full model", "Pareto front", "vtc-cls", "random", "pool"):
        assert f">{name}<" in svg
    assert "currentColor" in svg
    assert "http" not in svg


def ticks(svg: str) -> set[str]:
    return set(re.findall(r">([\d.]+%?)</text>", svg))


def test_the_axes_start_at_0_or_say_so() -> None:
    low = curve(decision(), "flops_ratio")
    assert {"0%", "100%"} <= ticks(low)
    assert "axis starts" not in curve(Decision(results([*ROWS, row("trsm", 36, 0.2)])), "flops_ratio")
    high = curve(Decision(results([ROWS[0], row("vtc-cls", 36, 0.9)])), "tokens_average")
    assert "accuracy, % (axis starts at 80)" in high
    assert {"0", "80"} <= ticks(high)


def test_equal_curves_do_not_cover_each_other() -> None:
    """Two methods with the same results: their markers stand beside each other."""
    svg = curve(Decision(results([ROWS[0], row("trsm", 36, 0.9), row("vtc-cls", 36, 0.9)])), "flops_ratio")
    places = [
        float(re.findall(rf'<use href="[^"]*" x="([\d.]+)" y="[\d.]+" style="[^"]*stroke: {colour}', svg)[0])
        for colour in COLOURS[:2]
    ]
    assert 0.5 < abs(places[0] - places[1]) < 5


def test_long_specs_fit_the_legend() -> None:
    spec = "vtc-cls(first_layer=12, last_layer=22) + fastv(layer=8, keep=64, positions='contiguous')"
    svg = curve(Decision(results([ROWS[0], row(spec, 36, 0.9)])), "flops_ratio")
    assert spec not in svg
    assert ">vtc-cls(first_layer=12, last_layer=22) + fastv(layer=8,<" in svg


def test_the_time_saved_follows_from_the_speedups() -> None:
    """A prefill that takes 10 ms longer, and steps that take 1 ms less: even after ten tokens."""
    slow = row(
        "trsm", 36, 0.9, prefill_ms=30.0, prefill_speedup=2 / 3, decode_ms_per_token=1.0, decode_speedup=2.0,
        break_even="after", break_even_tokens=10.0,
    )  # fmt: skip
    assert [saved_ms(slow.row, tokens) for tokens in (0, 10, 20)] == pytest.approx([-10, 0, 10])
    svg = time_saved(Decision(results([ROWS[0], slow])))
    assert ">trsm at 36<" in svg
    assert ">generated tokens<" in svg
    assert time_saved(Decision(results([unmeasured(ROWS[0]), unmeasured(slow)]))) == ""


# -- the page -------------------------------------------------------------------------------------------------------


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
    assert "what colour is &lt;b&gt;it&lt;/b&gt; in 0?" in text
    assert "&#39;&lt;x&gt;&#39;" in text
    for words in (
        "vtc-cls at 36",
        '>90.0</span> <span class="detail">86.7–92.6<',
        "prefers-color-scheme",
        'name="viewport"',
        "2.13.0",
    ):
        assert words in text


def test_pages_stay_small(tmp_path: Path) -> None:
    rows = [ROWS[0], *(row(f"method-{i}", 36, 0.5) for i in range(120))]
    assert len(render(results(rows, folder=tmp_path), tmp_path)) < 3_000_000


def test_nothing_measured_leaves_the_costs_out(tmp_path: Path) -> None:
    text = render(results([unmeasured(draft) for draft in ROWS]), tmp_path)
    assert "Accuracy against visual tokens" in text
    for costs in ("Accuracy against prefill", "Costs in detail", "prefill speedup", "Time saved"):
        assert costs not in text
        assert costs in render(results(ROWS), tmp_path)


def test_the_page_shows_the_decision_before_the_table(tmp_path: Path) -> None:
    text = render(results(ROWS), tmp_path)
    choice = text.index('<p class="answer">vtc-cls 90.0 %</p>')
    assert text.index("−3.0 points to full") > choice
    assert text.index("Cheapest method" if "Cheapest method" in text else "Every method loses") < text.index("<table")
    assert choice < text.index("<table")
    assert re.search(r'<tr class="method best front"><th scope="row">vtc-cls <span class="mark">best</span>', text)


def test_losses_are_coloured_only_where_the_interval_says_so(tmp_path: Path) -> None:
    text = render(results([ROWS[0], row("trsm", 36, 0.92, shift=20)], types=("",)), tmp_path)
    assert 'class="lost"' not in text
    assert 'class="lost"' in render(results(ROWS, types=("",)), tmp_path)


def test_types_show_their_number_of_questions_and_their_gaps(tmp_path: Path) -> None:
    text = render(results([ROWS[0], row("trsm", 36, (0.93, 0.6))]), tmp_path)
    assert 'title="200 questions of type colour">colour (n=200)</th>' in text
    assert re.search(
        r'class="lost">\s*<span class="value">60.0</span> <span class="detail">−33.0\n−39.8 to −26.9<', text
    )


def test_many_types_are_shown_in_several_tables(tmp_path: Path) -> None:
    text = render(results(ROWS, types=tuple(f"type {i}" for i in range(20))), tmp_path)
    assert [text.count(f">type {i} (n=20)</th>") for i in range(20)] == [1] * 20
    assert text.count("<table") == 2 + 3


def test_examples_are_folded_and_those_that_tell_methods_apart_come_first(tmp_path: Path) -> None:
    predictions = (
        {},
        {"vtc-cls": "blue"},
        {"full": "blue"},
        dict.fromkeys(("full", "vtc-cls", "random", "pool"), "blue"),
    )
    text = render(results(ROWS, predictions=predictions, folder=tmp_path), tmp_path)
    summaries = re.findall(r'<summary>.* in (\d)\? <span class="soft">\(red\) (.*)</span></summary>', text)
    assert summaries == [
        ("1", "full model right; wrong: vtc-cls at 36"),
        ("2", "full model wrong; all methods right"),
        ("0", "full model right; all methods right"),
        ("3", "full model wrong; all methods wrong"),
    ]
    assert "<details open" not in text


def test_skipped_questions_are_all_listed(tmp_path: Path) -> None:
    broken = [Skipped(str(i), f"data.jsonl, line {i}", "the image is truncated") for i in range(9)]
    text = render(results(ROWS, skipped=broken), tmp_path)
    assert "9 questions were skipped and not counted" in text
    assert "<dt>data.jsonl, line 8</dt><dd>the image is truncated</dd>" in text


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
    with pytest.raises(ImportError, match=r'reports need jinja2: in the checkout, pip install -e "\.\[report\]"'):
        render(results(ROWS), tmp_path)
