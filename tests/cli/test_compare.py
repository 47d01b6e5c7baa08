"""``compare``, the main job: killed, interrupted, resumed, and read in a browser."""

import base64
import json
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.calling import COMMAND, ENVIRONMENT, Outcome, run, run_many
from tests.support.browser import CHROMIUM, Browser

PINNED = [
    "method", "keep", "tokens_before", "tokens_after", "tokens_average", "samples", "accuracy", "accuracy_low",
    "accuracy_high", "flops_ratio", "prefill_ms", "prefill_speedup", "method_ms", "decode_ms_per_token",
    "peak_activation_mb", "kv_mb", "prefill_ms_low", "prefill_ms_high", "prefill_speedup_low", "prefill_speedup_high",
    "method_ms_low", "method_ms_high", "decode_ms_per_token_low", "decode_ms_per_token_high", "decode_speedup",
    "decode_speedup_low", "decode_speedup_high", "break_even_tokens", "break_even_low", "break_even_high", "break_even",
    "timing_note",
]  # fmt: skip
SAMPLES, RUNS = 48, 6  # full, vtc-cls and pool at one budget, an oracle, one seed of random, and blind
METHODS = "vtc-cls(first_layer=0), pool, random"


def arguments(model: str, output: Path) -> list[str]:
    options = ["--limit", str(SAMPLES), "--batch-size", "2", "--seeds", "1", "--keep", "11%", "--output", str(output)]
    return ["compare", "--model", model, "--methods", METHODS, *options, "--max-new-tokens", "4"]


def stopped(call: list[str], predictions: Path, lines: int, with_signal: signal.Signals) -> Outcome:
    """Start a call and stop it once so many lines are written."""
    program = [COMMAND, *call]
    running = subprocess.Popen(
        program,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 300
    while running.poll() is None and time.monotonic() < deadline:
        if predictions.exists() and predictions.read_bytes().count(b"\n") >= lines:
            running.send_signal(with_signal)
            break
        time.sleep(0.02)
    out, err = running.communicate(timeout=300)
    return Outcome(running.returncode, out, err)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare") / "out"


@pytest.fixture(scope="module")
def killed(model: str, output: Path) -> tuple[list[str], Outcome, list[str]]:
    """Kill a comparison, then interrupt it; return the lines on disk after each, and the second outcome."""
    call, predictions = arguments(model, output), output / "predictions.jsonl"
    assert stopped(call, predictions, 3, signal.SIGKILL).code == -signal.SIGKILL
    first = predictions.read_text("utf-8").splitlines()
    interrupted = stopped(call, predictions, len(first) + 4, signal.SIGINT)
    return first, interrupted, predictions.read_text("utf-8").splitlines()


@pytest.fixture(scope="module")
def finished(model: str, output: Path, killed: object) -> Outcome:
    """Run the same command again, to the end."""
    return run(*arguments(model, output), "--json")


def test_ctrl_c_prints_how_to_resume(killed: tuple[list[str], Outcome, list[str]]) -> None:
    first, interrupted, second = killed
    assert interrupted.code == 130
    assert interrupted.err.strip().splitlines()[-1] == "tokensieve: interrupted; resume with the same command"
    assert len(second) > len(first)


def test_resuming_repeats_nothing_and_loses_nothing(
    killed: tuple[list[str], Outcome, list[str]], finished: Outcome, output: Path
) -> None:
    assert finished.code == 0, finished.err
    lines = (output / "predictions.jsonl").read_text("utf-8").splitlines()
    whole = [line for line in killed[2] if _is_json(line)]
    assert lines[: len(whole) - 1] == whole[:-1]
    assert len(set(lines)) == len(lines)
    assert json.loads((output / "results.json").read_text("utf-8"))["complete"] is True


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def test_json_is_only_the_rows_with_the_pinned_fields_first(finished: Outcome) -> None:
    rows = json.loads(finished.out)
    assert [row["method"] for row in rows] == ["full", "vtc-cls(first_layer=0)", "pool", "random", "oracle", "blind"]
    assert (rows[-1]["tokens_after"], rows[-1]["prefill_ms"], rows[-1]["samples"]) == (0, None, SAMPLES)
    for row in rows:
        assert list(row)[: len(PINNED)] == PINNED
        assert sum(score["samples"] for score in row["types"]) == SAMPLES
        assert row["samples"] == SAMPLES
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
    assert (rows[0]["keep"], rows[0]["flops_ratio"]) == (None, 1)
    assert rows[0]["tokens_after"] == rows[0]["tokens_before"] > 144  # a question is about two images
    assert rows[1]["keep"] == 0.11
    assert rows[1]["tokens_after"] == pytest.approx(rows[0]["tokens_after"] / 9)
    assert rows[1]["flops_ratio"] < 1
    assert rows[1]["kv_mb"] < rows[0]["kv_mb"]
    for row in rows[:-1]:
        assert row["prefill_ms"] * row["prefill_speedup"] == pytest.approx(rows[0]["prefill_ms"])
        assert row["decode_ms_per_token"] * row["decode_speedup"] == pytest.approx(rows[0]["decode_ms_per_token"])
        assert row["prefill_ms_low"] <= row["prefill_ms"] <= row["prefill_ms_high"]
    assert [row["break_even"] is None for row in rows] == [True, False, False, False, False, True]


def test_the_referee_examines_every_row(finished: Outcome) -> None:
    full, vtc, pool, random, oracle, blind = (row["referee"] for row in json.loads(finished.out))
    assert [part["reference"] for part in vtc["against"]] == ["full", "random", "runner-up", "equal time"] or [
        part["reference"] for part in vtc["against"]
    ] == ["full", "random", "equal time"]  # without a runner-up it is the last of its budget
    for part in vtc["against"]:
        assert 0 < part["p"] <= part["p_holm"] <= 1
        assert part["low"] <= part["difference"] <= part["high"]
    assert [part["group"] for part in vtc["groups"]] == [
        "needs image", "hard", "easy", "hard, full right", "easy, full right",
    ]  # fmt: skip
    assert vtc["groups"][1]["by"] == "pool at 11%"  # downsample did not run
    assert vtc["groups"][1]["samples"] + vtc["groups"][2]["samples"] == SAMPLES
    assert 0 <= vtc["overlap"]["shift"] <= 1
    assert (pool["overlap"]["shift"], random["overlap"]["seeds"]) == (1, None)  # the same cells; one seed
    assert (full["overlap"], oracle["overlap"], blind["groups"]) == (None, None, [])


def test_the_paths_are_printed_apart_from_the_rows(finished: Outcome, output: Path) -> None:
    lines = finished.err.splitlines()
    notes = [line for line in lines if line.startswith("note: the times are uncertain: ")]  # other tests run beside
    assert notes == [f"note: {note}" for note in {row["timing_note"] for row in json.loads(finished.out)} if note]
    assert [line for line in lines if line not in notes] == [
        f"results: {output / 'results.json'}",
        f"report:  {output / 'report.html'}",
    ]


def test_a_finished_comparison_is_printed_without_new_answers(model: str, finished: Outcome, output: Path) -> None:
    before = (output / "predictions.jsonl").read_bytes()
    # a full disk for the report alone
    (output / "report.part").symlink_to("/dev/full")
    outcomes = run_many({
        "full disk": [*arguments(model, output), "--json"],
        "table": arguments(model, output),
        "other settings": [*arguments(model, output), "--prompt", "{question} now"],
        "other scope": [*arguments(model, output), "--budget-scope", "sample"],
        "a scope": ["compare", "--model", model, "--methods", "trsm", "--keep", "9", "--limit", "2",
                    "--budget-scope", "sample-score", "--separators", "none", "--no-measure",
                    "--output", output / "scope"],
    })  # fmt: skip
    full_disk = outcomes["full disk"]
    assert full_disk.code == 2
    assert len(json.loads(full_disk.out)) == RUNS
    *_, line = full_disk.err.splitlines()
    assert "report.html: No space left on device; results.json is kept" in line
    assert outcomes["table"].code == 0, outcomes["table"].err
    for row in json.loads(finished.out):
        assert re.search(
            rf"^ *{re.escape(row['method'])} .*{100 * row['accuracy']:.1f} \(", outcomes["table"].out, re.M
        )
    assert str(output) in outcomes["other settings"].refused()
    assert "(budget_scope differ)" in outcomes["other scope"].refused()
    assert outcomes["a scope"].code == 0, outcomes["a scope"].err
    for folder, scope, separators in ((output, "image", "kept-lines"), (output / "scope", "sample-score", "none")):
        settings = json.loads((folder / "results.json").read_text("utf-8"))["settings"]
        assert (settings["budget_scope"], settings["separators"]) == (scope, separators)
    assert "sample-score" in (output / "scope" / "report.html").read_text("utf-8")
    assert (output / "predictions.jsonl").read_bytes() == before


def test_the_report_needs_nothing_but_itself(finished: Outcome, output: Path) -> None:
    page = (output / "report.html").read_text("utf-8")
    assert len(page) < 3_000_000
    assert not re.search(r"https?://|<script|@import", page)
    assert all(source.startswith(("data:", "#")) for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    for row in json.loads(finished.out):
        assert row["method"] in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_report_in_a_browser(finished: Outcome, output: Path, tmp_path: Path) -> None:
    """Load the page at the width of a phone and of a desktop: all is drawn, nothing is cut off."""
    with Browser(tmp_path / "profile") as browser:
        browser.open(output / "report.html", 1200)
        assert browser.faults([390, 1200]) == {}
        assert browser.evaluate("document.images.length") >= RUNS - 1  # blind has no tokens to show
        assert browser.evaluate("document.querySelectorAll('#referee table').length") == 3
        assert "Without the image the model answers" in browser.evaluate("document.querySelector('#referee').innerText")
        assert browser.evaluate("[...document.images].filter(image => !image.naturalWidth).length") == 0
        heights = browser.evaluate(
            "[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height)"
        )
        assert len(heights) >= 3
        assert min(heights) > 100


def test_a_full_disk_keeps_the_answers(model: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        Image.new("RGB", (1, 1)).save(disk / "spare.png")
        outcome = run(*arguments(model, disk / "out"), "--no-measure")
        assert "No space left on device" in outcome.refused()
        kept = (disk / "out" / "predictions.jsonl").read_text("utf-8") if (disk / "out").is_dir() else ""
        assert all(_is_json(line) for line in kept.splitlines()[:-1])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_data_of_every_kind(model: str, photo: Path, tmp_path: Path) -> None:
    """Several images, a transparent one, a data: URI, choices, and a table of the datasets library with splits."""
    datasets = pytest.importorskip("datasets")
    Image.new("LA", (60, 40), (0, 0)).save(tmp_path / "clear.png")
    content = base64.b64encode((tmp_path / "clear.png").read_bytes()).decode()
    rows = [
        {"image": [str(photo), "clear.png"], "question": "is there a cup?", "answer": "no"},
        {"image": f"data:image/png;base64,{content}", "question": "is there a cup?", "answer": "no"},
        {"image": "clear.png", "question": "is it red?", "answer": "B", "choices": ["yes", "no"]},
    ]
    (tmp_path / "data.json").write_text(json.dumps({"data": rows}))
    table = datasets.Dataset.from_dict({"image": [str(photo)], "question": ["is it red?"], "answer": ["no"]})
    table = table.cast_column("image", datasets.Image())
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "saved")
    options = ["--model", model, "--methods", "pool", "--keep", "25%", "--no-measure", "--json"]
    calls = {
        "file": ["compare", "--data", tmp_path / "data.json", "--output", tmp_path / "a", *options],
        "folder": ["compare", "--data", tmp_path / "saved", "--split", "test", "--output", tmp_path / "b", *options],
        "no split": ["compare", "--data", tmp_path / "saved", "--output", tmp_path / "c", *options],
    }
    outcomes = run_many(calls)
    full, pool, blind = json.loads(outcomes["file"].out)
    assert blind["method"] == "blind"
    assert (full["tokens_before"], pool["tokens_after"]) == (144 * 4 / 3, 36 * 4 / 3)
    assert [row["samples"] for row in json.loads(outcomes["folder"].out)] == [1, 1, 1]
    assert "the splits are train, test; choose one with --split" in outcomes["no split"].err.splitlines()[-1]


def test_images_on_the_web(model: str, photo: Path, tmp_path: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(photo.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    row = {"image": f"http://127.0.0.1:{server.server_port}/{photo.name}", "question": "is it red?", "answer": "no"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    options = [
        "--model",
        model,
        "--methods",
        "pool",
        "--no-measure",
        "--no-report",
        "--output",
        tmp_path / "out",
        "--json",
    ]
    call = ["compare", "--data", tmp_path / "data.jsonl", *options]
    outcome = run(*call, "--fetch-images", XDG_CACHE_HOME=str(tmp_path / "cache"))
    server.shutdown()
    assert [row["samples"] for row in json.loads(outcome.out)] == [1, 1, 1, 1], outcome.err
    (fetched,) = (tmp_path / "cache" / "tokensieve" / "images").iterdir()
    assert fetched.read_bytes() == photo.read_bytes()
    assert "images on the web are not fetched" in run(*call).refused()
