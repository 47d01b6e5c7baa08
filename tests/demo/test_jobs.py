"""Comparisons in the background: progress, questions meanwhile, cancelling and continuing, and the reports."""

import json
import time
from pathlib import Path

import pytest

from tokensieve import Refusal, reference
from tokensieve.demo import cards
from tokensieve.demo.examples import examples
from tokensieve.demo.jobs import Jobs, Status
from tokensieve.demo.run import Request, Workbench

pytestmark = pytest.mark.skipif(not (reference.path() / "model.safetensors").is_file(), reason="no trained weights")
SECONDS = 120


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench("reference", *reference.load())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The questions on a few scenes, as a file: the bundled benchmark itself takes seconds to draw."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number, example in enumerate(examples("reference")):
        example.samples[0].open().save(folder / f"{number}.png")
        rows += [
            {"image": f"{number}.png", "question": sample.question, "answer": list(sample.answers)}
            for sample in example.samples
        ]
    (folder / "scenes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "scenes.jsonl")


def test_a_comparison_runs_while_questions_are_answered(bench: Workbench, data: str, tmp_path: Path) -> None:
    jobs = Jobs(bench, tmp_path, data)
    assert cards.progress(jobs.status) == ""
    asked = Request(examples("reference")[0].picture, "where is the umbrella?", ("trsm",), 0.25, rounds=0)
    alone = [row.answer for row in bench.rows(asked)]
    jobs.start("first", ["trsm", "random"], [16], 21)
    with pytest.raises(Refusal, match="the comparison first is running"):
        jobs.start("second", ["trsm"], [0.25], 5)
    meanwhile, states = [], []
    while jobs.status.state == "running" and not meanwhile[4:]:
        states.append(jobs.status)
        meanwhile.append([row.answer for row in bench.rows(asked)])
    assert jobs.wait(SECONDS)
    assert jobs.status.state == "done", jobs.status
    assert meanwhile
    assert all(answers == alone for answers in meanwhile)
    assert any(0 < state.done < state.total for state in states)
    assert jobs.status.done == jobs.status.total == 21 * (1 + 1 + 5 + 1)  # full, trsm, five seeds of random, blind
    assert jobs.reports() == ["first"]
    assert "Visual-token reduction" in jobs.report("first")
    rows = json.loads((tmp_path / "first" / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"full", "trsm", "random", "blind"}


def test_a_cancelled_comparison_continues(bench: Workbench, data: str, tmp_path: Path) -> None:
    jobs = Jobs(bench, tmp_path, data)
    jobs.start("run", ["random"], [0.25], 21)
    end = time.monotonic() + SECONDS
    while jobs.status.done < 16 and time.monotonic() < end:
        time.sleep(0.01)
    jobs.cancel()
    assert jobs.wait(SECONDS)
    assert jobs.status.state == "cancelled"
    assert "its answers are kept" in cards.progress(jobs.status)
    assert not bench.lock.locked()
    kept = jobs.status.done
    assert 16 <= kept < jobs.status.total
    assert jobs.reports() == []
    jobs.start("run", ["random"], [0.25], 21)
    counts = set()
    while not jobs.wait(0.001):
        counts.add(jobs.status.done)
    assert jobs.status.state == "done", jobs.status
    assert not counts & set(range(1, 16)), "answers on disk are not computed again"


def test_wrong_input_is_one_clear_line(bench: Workbench, data: str, tmp_path: Path) -> None:
    jobs = Jobs(bench, tmp_path, data)
    for name in ("", "../up", "a/b", ".hidden", "x" * 65):
        with pytest.raises(Refusal, match="a name consists of letters"):
            jobs.start(name, ["trsm"], [0.25], 5)
        with pytest.raises(Refusal, match="a name consists of letters"):
            jobs.report(name)
    with pytest.raises(Refusal, match="did you mean trsm"):
        jobs.start("a", ["trms"], [0.25], 5)
    with pytest.raises(Refusal, match="questions must be a whole number from 1 to 2000; got 0"):
        jobs.start("a", ["trsm"], [0.25], 0)
    with pytest.raises(Refusal, match=r"there is no report\.html in none"):
        jobs.report("none")
    assert jobs.status == Status()


def test_an_error_in_the_background_is_one_line(bench: Workbench, tmp_path: Path) -> None:
    jobs = Jobs(bench, tmp_path, str(tmp_path / "no.jsonl"))
    jobs.start("a", ["trsm"], [0.25], 5)
    assert jobs.wait(SECONDS)
    assert jobs.status.state == "failed"
    assert "no.jsonl" in cards.progress(jobs.status)
    jobs = Jobs(bench, tmp_path)
    jobs.start("b", ["pumer"], [0.25], 1)  # refused by this model
    assert jobs.wait(SECONDS)
    assert jobs.status.state == "failed"
    assert not bench.lock.locked()
