"""The page in a real browser, from the width of a phone to that of a large screen."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.report_rows import Draft, results, row
from tests.support.browser import CHROMIUM, Browser
from tokensieve.evaluate import Results, Skipped
from tokensieve.evaluate.referee import referee
from tokensieve.report.html import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
WIDTHS = (360, 390, 768, 1024, 1280, 1400, 1920, 2560)
SPEC = "vtc-cls(first_layer=12, last_layer=22) + fastv(layer=8, keep=64, positions='contiguous')"
NOTE = "the times are uncertain: other processes used 1.6 of 2 cores beside 2 threads of torch"
AFTER = {"break_even": "after", "break_even_tokens": 1234.5, "break_even_low": 1012.0, "break_even_high": None}
LARGE = {"prefill_ms": 12345.6, "prefill_ms_low": 11345.6, "prefill_ms_high": 13345.6, "peak_activation_mb": 54321.0}


def rows(keep: float) -> list[Draft]:
    return [
        row("divprune", keep, 0.91, timing_note=NOTE, **AFTER, **LARGE),
        row("fastervlm", keep, 0.90, shift=20, break_even="not told apart"),
        row(SPEC, keep, 0.89, shift=30, break_even="never"),
        row("path/to/my_own_methods/another_method.py:AnotherMethod(keep_words=True)", keep, 0.05, shift=9),
        row("random", keep, 0.5, seeds=5),
        row("oracle", keep, 0.88),
    ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def demanding() -> Results:
    """Return results with long names, long numbers, many types, and every kind of warning."""
    types = ("hallucinated relations between objects", *(f"type {i}" for i in range(8)))
    skipped = [Skipped(str(i), f"data/a-rather-long-name-{i}.jsonl, line {i}", "truncated") for i in range(9)]
    drafts = [row("full", None, 0.93, samples=180), *(r for keep in (0.25, 0.11) for r in short(rows(keep)))]
    return results(drafts, types=types, skipped=skipped)


def short(drafts: list[Draft]) -> list[Draft]:
    """Return the rows on 180 questions, few enough for a warning."""
    accuracies = [(draft, draft.row) for draft in drafts]
    names = ("timing_note", "break_even", "break_even_tokens", "break_even_low", "break_even_high", *LARGE)
    return [
        row(
            r.method,
            r.keep,
            r.accuracy,
            samples=180,
            shift=3 * i,
            seeds=len(d.scores),
            **{n: getattr(r, n) for n in names},
        )
        for i, (d, r) in enumerate(accuracies)
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_report(demanding(), folder, command="tokensieve compare --methods " + 30 * "a-long-argument,")


def test_the_probe_finds_what_is_cut_off(browser: Browser, tmp_path: Path) -> None:
    text = "<td style='max-width: 4rem; white-space: nowrap'>a cell that is too narrow</td>"
    hidden = "<div style='width: 80px; overflow: auto; white-space: nowrap'>text that must be scrolled to</div>"
    wide = "<p style='width: 700px'>" + "words " * 40 + "</p>"
    (tmp_path / "page.html").write_text(f"<table><tr>{text}</tr></table>{hidden}{wide}<p>good</p>", "utf-8")
    browser.open(tmp_path / "page.html", 360)
    faults = "\n".join(browser.faults([360])[360])
    assert "the page is " in faults
    assert '"a cell that is too narrow" is cut off by <td>' in faults
    assert '"text that must be scrolled to" is cut off by <div>' in faults
    assert "good" not in faults
    assert "the page is" not in "\n".join(browser.faults([1280])[1280])


def test_nothing_is_cut_off_at_any_width(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    assert browser.evaluate("innerWidth") == 1280
    assert browser.faults(WIDTHS) == {}
    assert browser.evaluate("document.querySelectorAll('svg').length") == 4


@pytest.mark.parametrize("budgets", [(0.25, 0.11), (0.5, 0.33, 0.22, 0.11, 0.05)])
def test_the_first_screen_decides(browser: Browser, tmp_path: Path, budgets: tuple[float, ...]) -> None:
    drafts = [row("full", None, 0.93), *(draft for keep in budgets for draft in rows(keep))]
    browser.open(write_report(results(drafts), tmp_path), 1280, 800)
    seen = browser.evaluate("document.querySelector('#decision').innerText")
    assert browser.evaluate("document.querySelector('#decision').getBoundingClientRect().bottom") <= 800
    assert seen.count("divprune 91.0 %") == len(budgets)
    assert "−2.0 points to full" in seen
    assert "not told apart from fastervlm" in seen
    assert "of the prefill FLOPs" in seen
    assert "faster prefill" in seen
    assert "The times are uncertain" in seen
    assert "No method is shown to keep the accuracy of the full model" in seen


def test_cards_name_their_values_in_a_narrow_window(browser: Browser, page: Path) -> None:
    browser.open(page, 390)
    label = "getComputedStyle(document.querySelector('tr.best td'), '::before').content"
    assert browser.evaluate(label) == '"tokens"'
    assert browser.evaluate("getComputedStyle(document.querySelector('.cards thead')).display") == "none"
    browser.resize(1280)
    assert browser.evaluate(label) == "none"
    assert browser.evaluate("getComputedStyle(document.querySelector('.cards thead')).display") != "none"


CONTRAST = """(() => {
  const light = colour => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d");
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const linear = c => c / 255 <= .04045 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4;
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(linear);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)" && !/, 0\\.\\d+\\)$/.test(colour)) return light(colour);
    }
  };
  let worst = 99;
  for (const node of document.querySelectorAll("p, li, th, dt, dd, summary, span, svg")) {
    const [a, b] = [light(getComputedStyle(node).color), behind(node)];
    worst = Math.min(worst, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
  }
  return [behind(document.body), worst];
})()"""


@pytest.mark.parametrize(("dark", "media"), [(False, "screen"), (True, "screen"), (True, "print")])
def test_text_is_readable_in_light_dark_and_print(browser: Browser, page: Path, dark: bool, media: str) -> None:
    browser.open(page, 1280, dark=dark, media=media)
    back, worst = browser.evaluate(CONTRAST)
    assert (back < 0.1) == (dark and media == "screen")
    assert worst >= 4.5  # the contrast that the Web Content Accessibility Guidelines require


def test_the_referees_tables_are_shown_whole(browser: Browser, tmp_path: Path) -> None:
    """Fold them out at the width of a phone and of a desktop: nothing is cut off, and a hidden loss is marked."""
    full, blind = row("full", None, 0.93), row("blind", None, 0.3, tokens_after=0, tokens_average=0)
    hidden = row("fastv(layer=1)", 0.25, (0.93, 0.84), tokens_average=63.0)
    drafts = [full, *rows(0.25), hidden, row("downsample", 0.25, 0.4), blind]
    browser.open(write_report(referee(results(drafts)), tmp_path), 1280)
    browser.evaluate("document.querySelectorAll('#referee details').forEach(part => part.open = true)")
    assert browser.evaluate("document.querySelectorAll('#referee table').length") == 3
    shown = browser.evaluate("document.querySelector('#referee').innerText")
    for part in ("Without the image the model answers 30.0 % right", "downsample at 25% gets 240 questions wrong"):
        assert part in shown
    for part in ("Holm", "to random", "n=240", "5 seeds", "36 (63)"):
        assert part in shown
    body = browser.evaluate("document.body.innerText")
    assert "Hidden loss: fastv(layer=1) at 25% loses 9.0 points on where" in body
    marked = "[...document.querySelectorAll('td[data-label=\"hidden loss\"]')].map(cell => cell.innerText.trim())"
    assert browser.evaluate(marked).count("where") == 1
    assert browser.faults([390, 1280]) == {}


def test_print_unfolds_the_details(browser: Browser, page: Path) -> None:
    height = "document.querySelector('details table').getBoundingClientRect().height"
    visible = "document.querySelector('details table').checkVisibility({ contentVisibilityAuto: true })"
    browser.open(page, 1280)
    assert not browser.evaluate(visible)
    browser.open(page, 1280, media="print")
    assert browser.evaluate(visible)
    assert browser.evaluate(height) > 100


def test_print_keeps_the_tables_and_cuts_nothing_off(browser: Browser, page: Path) -> None:
    browser.open(page, 720, media="print")  # A4 without its margins
    assert browser.faults([720]) == {}
    assert browser.evaluate("getComputedStyle(document.querySelector('.cards thead')).display") != "none"
