"""``compare`` in two processes of a launcher: the rows of one process, one output, and no silent end."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.cli.calling import ENVIRONMENT, Outcome, run

pytestmark = pytest.mark.slow
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
QUESTIONS = 21


def start(*program: str | Path) -> subprocess.Popen[str]:
    command = [*LAUNCH, *map(str, program)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def end(launcher: subprocess.Popen[str]) -> Outcome:
    out, err = launcher.communicate(timeout=300)
    return Outcome(launcher.returncode, out, err)


@pytest.fixture(scope="module")
def call(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments without an output folder; the third image is damaged."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:9000])
    rows = [
        {"image": f"{i % 7}.png", "question": f"what is it{' now' * (i % 5)}?", "answer": "red"}
        for i in range(QUESTIONS)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--batch-size",
        "2",
        "--seeds",
        "2",
        "--keep",
        "11%",
        "--max-new-tokens",
        "3",
        "--no-measure",
        "--no-report",
    ]
    return [
        "compare",
        "--model",
        model,
        "--data",
        str(folder / "data.jsonl"),
        "--methods",
        "vtc-cls, random",
        *options,
        "--json",
    ]


@pytest.fixture(scope="module")
def alone(call: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    output = tmp_path_factory.mktemp("one") / "out"
    return run(*call, "--output", output), output


def answers(output: Path) -> list[str]:
    return sorted((output / "predictions.jsonl").read_text("utf-8").splitlines())


TOKENSIEVE = [sys.executable, "-m", "tokensieve"]


def test_two_processes_give_the_rows_of_one(call: list[str], alone: tuple[Outcome, Path], tmp_path: Path) -> None:
    one, output = alone
    assert one.code == 0, one.err
    two = end(start(*TOKENSIEVE, *call, "--output", tmp_path / "two"))
    assert two.code == 0, two.err
    assert json.loads(two.out) == json.loads(one.out)  # printed once
    assert two.err.count("2 processes share the questions") == 1
    assert "share the questions" not in one.err
    notes = [line for line in two.err.splitlines() if "questions skipped" in line]
    assert notes == [line for line in one.err.splitlines() if "questions skipped" in line]
    assert len(notes) == 1
    assert "3 of 21 questions skipped: images cannot be read (data.jsonl, lines 3, 10, 17: 2.png" in notes[0]
    assert [line for line in two.err.splitlines() if line.startswith("results: ")] == [
        f"results: {tmp_path}/two/results.json"
    ]
    assert answers(tmp_path / "two") == answers(output)
    results = [json.loads((folder / "results.json").read_text("utf-8")) for folder in (output, tmp_path / "two")]
    assert results[0]["scores"] == results[1]["scores"]
    assert results[0]["skipped"] == results[1]["skipped"]


@pytest.mark.parametrize(("rank", "with_signal"), [("0", signal.SIGKILL), ("1", signal.SIGKILL), ("1", signal.SIGINT)])
def test_the_end_of_one_process_is_noticed_and_one_process_continues(
    call: list[str], alone: tuple[Outcome, Path], tmp_path: Path, rank: str, with_signal: signal.Signals
) -> None:
    output = tmp_path / "out"
    launcher = start(*TOKENSIEVE, *call, "--output", output)
    predictions, deadline = output / "predictions.jsonl", time.monotonic() + 200
    while launcher.poll() is None and time.monotonic() < deadline:
        if predictions.exists() and predictions.read_bytes().count(b"\n") >= 6:
            (victim,) = (p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == rank)
            victim.send_signal(with_signal)
            break
        time.sleep(0.01)
    ended = end(launcher)
    assert ended.code != 0
    assert ended.out == ""
    before = predictions.read_text("utf-8").splitlines()
    one, whole = alone
    assert 6 <= len(before) < len(answers(whole))
    outcome = run(*call, "--output", output)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out) == json.loads(one.out)
    assert answers(output) == answers(whole)


TOGETHER = """
import os
from tokensieve import Refusal
from tokensieve.evaluate.processes import Processes
processes = Processes.launched()
try:
    with processes.together(), processes.together():
        assert processes.exchange(processes.rank) == [0, 1]
        if processes.rank == 1:
            raise Refusal("no model here")
        processes.exchange("a batch")
except Refusal as error:
    os.write(1, f"{processes.rank}: {error}\\n".encode())  # one write: lines of two processes must not mix
"""


def test_a_refusal_of_one_process_ends_all() -> None:
    outcome = end(start(sys.executable, "-c", TOGETHER))
    assert outcome.code == 0, outcome.err
    assert sorted(outcome.out.splitlines()) == ["0: no model here", "1: no model here"]


def test_a_refusal_is_printed_once(call: list[str], tmp_path: Path) -> None:
    outcome = end(start(*TOKENSIEVE, *call, "--output", tmp_path, "--metric", "exactly"))
    assert outcome.code != 0
    lines = [line for line in outcome.err.splitlines() if line.startswith("tokensieve: ")]
    assert len(lines) == 1
    assert "unknown metric 'exactly'" in lines[0]
