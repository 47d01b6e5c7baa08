"""The page in a real browser, served by the real command."""

import json
import re
import signal
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.cli.calling import run, run_many
from tests.demo.server import Demo
from tests.support.browser import CHROMIUM, FAULTS
from tokensieve import reference
from tokensieve.demo.examples import examples
from tokensieve.demo.run import Request, Workbench

pytest.importorskip("gradio", reason="the extra 'demo' is not installed: make test-demo")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-demo")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
    pytest.mark.skipif(not (reference.path() / "model.safetensors").is_file(), reason="no trained weights"),
]
SECONDS = 90_000  # ms to wait for something on the page
# an answer to the next question is one without this mark
MARK = "document.querySelectorAll('#result > * *').forEach(old => { old.dataset.old = '' })"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    rows = []
    for number, example in enumerate(examples("reference")):
        example.samples[0].open().save(folder / f"{number}.png")
        rows += [
            {"image": f"{number}.png", "question": sample.question, "answer": list(sample.answers)}
            for sample in example.samples
        ]
    (folder / "scenes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with Demo(folder, "--data", "scenes.jsonl", "--methods", "trsm, pool", "--runs", "results") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(demo: Demo, browser: Any) -> Iterator[Any]:
    """A new visitor. At the end, no request has left the server, and no script has failed."""
    hosts, errors = set(), []
    visitor = browser.new_page(viewport={"width": 1280, "height": 900})
    visitor.set_default_timeout(SECONDS)
    visitor.on("request", lambda request: hosts.add(urlsplit(request.url)[:2]))
    visitor.on("websocket", lambda socket: hosts.add(urlsplit(socket.url)[:2]))
    visitor.on("pageerror", lambda error: errors.append(str(error)))
    visitor.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    visitor.goto(demo.url)
    visitor.wait_for_selector("#ask")
    visitor.wait_for_timeout(500)
    yield visitor
    visitor.close()
    local = {("http", f"127.0.0.1:{demo.port}")}
    assert {host for host in hosts if host[0] not in ("data", "blob")} == local
    assert errors == []
    assert "Traceback" not in demo.log.read_text()


def field(page: Any, name: str) -> Any:
    """Return the visible field with a label."""
    return page.get_by_label(name, exact=True).locator("visible=true").first


def ask(page: Any, question: str | None = None, *, cards: int = 3, rounds: int = 0) -> list[str]:
    """Ask on the first tab; return the texts of the cards."""
    if question is not None:
        field(page, "Question").fill(question)
    if not page.get_by_text("Timed rounds").is_visible():
        page.get_by_role("button", name="More").click()
    page.get_by_label("number input for Timed rounds").fill(str(rounds))
    page.get_by_label("number input for Timed rounds").press("Tab")
    page.evaluate(MARK)
    page.click("#ask")
    page.wait_for_function(
        "n => document.querySelectorAll('#result .cards:not([data-old]) .card').length == n"
        " && !/answering|measuring/.test(document.querySelector('#result').innerText)",
        arg=cards,
    )
    return [card.inner_text() for card in page.query_selector_all("#result .card")]


def refused(page: Any) -> str:
    """Press Ask; return the one line that is shown instead of cards."""
    page.evaluate(MARK)
    page.click("#ask")
    page.wait_for_selector("#result .message:not([data-old])")
    assert page.query_selector("#result .card") is None
    text: str = page.inner_text("#result .message")
    assert "\n" not in text
    return text


def upload(page: Any, file: Path) -> None:
    """Put the user's image in the place of the one on the page."""
    page.get_by_role("button", name="Remove Image").locator("visible=true").click()
    # the image is no longer the example's
    page.wait_for_function(
        "name => [...document.querySelectorAll('input')].some(i => i.ariaLabel == name && !i.value)",
        arg="Questions on this example",
    )
    page.locator("input[type=file]").first.set_input_files(str(file))
    # the page shows the server's copy: from now on, it is what Ask sends
    page.wait_for_function("name => [...document.images].some(i => i.src.endsWith(name))", arg=file.name)


def test_methods_side_by_side(page: Any) -> None:
    full, trsm, pool = ask(page, rounds=2)
    assert full.startswith("full")
    assert trsm.startswith("trsm at 25%")
    expected = examples("reference")[0].samples[0]
    bench = Workbench("reference", *reference.load())
    rows = bench.rows(Request(expected.image, expected.question, ("trsm", "pool"), 0.25, rounds=0))
    for text, row in zip((full, trsm, pool), rows, strict=True):
        mark = "✓" if row.answer in expected.answers else "✗"
        assert f"{row.answer} {mark}" in text
    assert re.search(r"visual tokens\s+144 of 144", full)
    assert re.search(r"visual tokens\s+36 of 144", trsm)
    assert re.search(r"merged\s+144 tokens into 36 groups", pool)
    assert re.search(r"prefill FLOPs\s+\d\d%", trsm)
    assert re.search(r"against full\s+(faster|slower|not told apart)", trsm)
    sizes = page.evaluate("[...document.querySelectorAll('#result img')].map(image => image.naturalWidth)")
    assert sizes == [384, 384, 384]


def test_the_budget_and_the_positions(page: Any) -> None:
    field(page, "a number of tokens").check()
    field(page, "Tokens").fill("9")
    field(page, "contiguous").check()
    assert "9 of 144" in ask(page)[1]
    field(page, "Tokens").fill("1000")
    assert "kept whole" in ask(page)[1]
    field(page, "Tokens").fill("0")
    assert "keep must be a whole number of tokens >= 1, or a share in (0, 1]; got 0" in refused(page)
    field(page, "Tokens").fill("2.5")
    assert refused(page) == "the number of tokens to keep must be a whole number; got 2.5"


def test_another_example_and_its_questions(page: Any) -> None:
    page.locator(".examples button").nth(2).click()
    sample = examples("reference")[2].samples[0]
    page.wait_for_function(
        "text => [...document.querySelectorAll('textarea')].some(field => field.value == text)", arg=sample.question
    )
    full = ask(page)[0]
    assert ("✓" in full) == (sample.answers[0] in full)
    assert "✓" in full or "✗" in full


def test_an_image_of_the_user(page: Any, tmp_path: Path) -> None:
    examples("reference")[3].samples[0].open().rotate(90).save(tmp_path / "mine.png")
    upload(page, tmp_path / "mine.png")
    full = ask(page, "where is the sun?")[0]
    assert "✓" not in full
    assert "✗" not in full
    assert "knows only its own drawn scenes" in page.inner_text("#result")


def huge_png() -> bytes:
    """Return a small file that says that it has 400 million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_wrong_input_is_one_line_on_the_page(page: Any, tmp_path: Path) -> None:
    field(page, "Question").fill("  ")
    assert refused(page) == "the question is empty; ask something about the image"
    field(page, "Question").fill("where is the sun?")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    upload(page, tmp_path / "broken.png")
    assert "broken.png: not an image, or of a kind that Pillow cannot read" in refused(page)
    (tmp_path / "huge.png").write_bytes(huge_png())
    upload(page, tmp_path / "huge.png")
    assert re.fullmatch(r"huge\.png: .*; the limit is 100,000,000 pixels", refused(page))


def test_a_wrong_method_is_one_line_on_the_page(page: Any) -> None:
    methods = field(page, "Methods")
    for spec, line in (("trms", "did you mean trsm"), ("/etc/x.py:Y", "takes no method from a file")):
        methods.fill(spec)
        methods.press("Enter")
        assert line in refused(page)
        methods.press("Backspace")
    full, trsm, _ = ask(page, "</s>")
    assert "no words to go by" in trsm
    assert "no words" not in full


def test_a_conversation_goes_on_on_the_cache(page: Any) -> None:
    page.get_by_role("tab", name="Talk").click()
    page.click("#talk")
    page.wait_for_selector("#conversation .turn >> nth=1")
    asked = examples("reference")[0].samples
    field(page, "Question").fill(asked[1].question)
    field(page, "Question").press("Enter")
    page.wait_for_selector("#conversation .turn >> nth=3")
    text = page.inner_text("#conversation")
    assert f"by the words of the first question, “{asked[0].question}”. Later questions" in text
    assert "kept 36 of 144 visual tokens" in text
    field(page, "Question").fill("")
    page.click("#talk")
    page.wait_for_selector("#conversation .message")
    assert page.inner_text("#conversation .message") == "the question is empty; ask something about the image"
    assert len(page.query_selector_all("#conversation .turn")) == 4
    page.click("#new")
    page.wait_for_function("!document.querySelector('#conversation .turn')")


def test_a_comparison_its_cancelling_and_its_report(page: Any, browser: Any, demo: Demo) -> None:
    page.get_by_role("tab", name="Compare").click()
    field(page, "Questions").fill("56")
    field(page, "Folder of results").fill("../away")
    page.click("#compare")
    page.wait_for_selector("#state .message")
    assert "a name consists of letters" in page.inner_text("#state")
    field(page, "Folder of results").fill("first")
    page.click("#compare")
    page.wait_for_selector("#state progress")
    page.click("#cancel")
    page.wait_for_function("/was cancelled after/.test(document.querySelector('#state').innerText)", timeout=SECONDS)
    page.click("#compare")
    page.wait_for_selector("#state progress")
    other = browser.new_page()  # another visitor finds the comparison, too
    other.goto(demo.url)
    other.get_by_role("tab", name="Compare").click()
    other.wait_for_selector("#state .message", timeout=SECONDS)
    assert "first" in other.inner_text("#state")
    other.close()
    page.wait_for_selector("#report iframe")
    report = page.frame_locator("#report iframe")
    assert "Visual-token reduction" in report.locator("h1").inner_text()
    assert (demo.log.parent / "results" / "first" / "report.html").is_file()


def test_two_visitors_at_once_do_not_mix(page: Any, browser: Any, demo: Demo) -> None:
    question = "what frame is around the 6?"
    alone = [ask(page), ask(page, question)]
    assert alone[0] != alone[1]
    visitors = [browser.new_page() for _ in range(2)]
    for visitor in visitors:
        visitor.set_default_timeout(SECONDS)
        visitor.goto(demo.url)
        visitor.get_by_role("button", name="More").click()
        visitor.get_by_label("number input for Timed rounds").fill("0")
    field(visitors[1], "Question").fill(question)
    for visitor in visitors:
        visitor.evaluate("document.querySelector('#ask').click()")  # returns at once
    for visitor, texts in zip(visitors, alone, strict=True):
        visitor.wait_for_function("document.querySelectorAll('#result .card').length == 3")
        assert [card.inner_text() for card in visitor.query_selector_all("#result .card")] == texts
        visitor.close()


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_cut_off(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    ask(page, rounds=1)
    page.wait_for_timeout(300)
    assert page.evaluate("document.scrollingElement.scrollWidth") == width
    # of our own pieces; in Gradio's the texts of hidden tabs stand outside
    cut = page.evaluate(
        FAULTS.replace("createTreeWalker(document.body", "createTreeWalker(document.querySelector('#result')")
    )
    assert cut == []


def test_ctrl_c_ends_the_page_while_it_computes(tmp_path: Path) -> None:
    with Demo(tmp_path, "--methods", "trsm") as demo:
        listening = socket.create_connection(("127.0.0.1", demo.port), timeout=10)
        taken = run("demo", "--no-browser", "--port", str(demo.port))
        assert re.search(r"cannot listen on 127\.0\.0\.1:\d+", taken.refused())
        start = time.monotonic()
        assert demo.stop(signal.SIGINT) == 130
        listening.close()
    assert time.monotonic() - start < 15
    lines = demo.log.read_text().splitlines()
    assert [line for line in lines if not line.startswith("note: ")] == [
        f"the page is at {demo.url} (Ctrl-C ends it)",
        "tokensieve: interrupted",
    ]
    assert list(demo.temporary.glob("tokensieve*")) == []


def test_the_command_refuses_before_it_loads() -> None:
    cases = {
        "did you mean trsm": ["--methods", "trms"],
        "no/such/model": ["no/such/model"],
        "none.jsonl": ["--data", "none.jsonl"],
    }
    outcomes = run_many({line: ["demo", "--no-browser", *words] for line, words in cases.items()})
    for line, outcome in outcomes.items():
        assert line in outcome.refused()
