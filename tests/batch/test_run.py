"""Each row is answered once, as ``compare`` answers it, through lost workers, killed drivers and full disks."""

import errno
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.batch.conftest import (
    PER_PART,
    ROWS,
    SETTINGS,
    assert_every_row_once,
    ids,
    job,
    kill,
    lines,
    wait_for,
    workers_of,
    write_rows,
)
from tokensieve.batch import Place, run
from tokensieve.batch.table import results
from tokensieve.batch.worker import Worker
from tokensieve.cli import app
from tokensieve.errors import DataError, OutputError, Refusal, ResumeError
from tokensieve.evaluate import compare, load_data
from tokensieve.loading import load_model

pytestmark = pytest.mark.slow
METHODS = ("full", "vtc-cls(keep=36)", "random(keep=36, seed=1)")


@pytest.fixture(scope="module")
def answered(cluster, questions, tmp_path_factory):
    """Return the job of three methods, its folder of answers and its summary."""
    folder, three = tmp_path_factory.mktemp("answers") / "out", job(questions, *METHODS)
    return three, folder, run(three, folder, place=Place(workers=2))  # one thread each


@pytest.fixture(scope="module")
def compared(questions, tmp_path_factory):
    model, processor = load_model("reference")
    options = {"max_new_tokens": SETTINGS.max_new_tokens, "measure": False, "seeds": 1, "referee": False}
    output = tmp_path_factory.mktemp("compared")
    compared = compare(model, processor, load_data(questions), METHODS[1:], [], output=output, **options)
    return compared, output / "predictions.jsonl"


def test_answers_and_table_are_those_of_compare(answered, compared, questions):
    three, folder, summary = answered
    expected, predictions = compared
    texts = {}
    for line in map(json.loads, predictions.read_text("utf-8").splitlines()):
        if "text" in line:
            texts[line["sample"].rpartition(" ")[0], line["run"]] = line["text"], line["before"], line["after"]
    answers = lines(folder)
    assert {(a["id"], a["method"]): (a["answer"], a["tokens_before"], a["tokens_after"]) for a in answers} == texts
    assert len(answers) == len(texts) == 3 * ROWS
    table = results(three, folder)
    assert [row.to_json() for row in table.rows] == [row.to_json() for row in expected.rows]
    assert table.rows[1].difference_low is not None
    assert (summary["rows"], summary["answers"], summary["errors"]) == (ROWS, 3 * ROWS, 0)
    assert summary["tokens_saved"] == pytest.approx(2 / 3 * 0.75)
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_a_finished_folder_is_counted_and_not_answered_again(answered):
    three, folder, summary = answered
    times = {path: path.stat().st_mtime_ns for path in folder.glob("answers/part-*")}
    again = run(three, folder)
    assert (again["rows"], again["rows_of_this_call"], again["rounds"]) == (summary["rows"], 0, 0)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("answers/part-*")} == times


def test_the_command_prints_the_table_of_compare_or_json(answered, compared):
    three, folder, summary = answered
    rows, _ = compared
    call = ["batch", "--data", three.data, "--output", str(folder), "--methods", ", ".join(METHODS)]
    call += ["--max-new-tokens", "4", "--rows-per-part", str(PER_PART)]
    text, as_json = (CliRunner().invoke(app, [*call, *option]) for option in ((), ("--json",)))
    assert text.exit_code == as_json.exit_code == 0
    for row in rows.rows:
        assert f"{100 * row.accuracy:.1f} ({100 * row.accuracy_low:.1f}–{100 * row.accuracy_high:.1f})" in text.stdout
    assert f"{ROWS} rows (0 now" in text.stderr
    printed = json.loads(as_json.stdout)
    assert printed["table"] == [row.to_json() for row in rows.rows]
    assert printed["answers"] == summary["answers"]


@pytest.mark.parametrize("change", ["methods", "prompt", "data"])
def test_another_command_is_refused_in_the_folder(answered, change, tmp_path):
    three, folder, _ = answered
    other = {
        "methods": lambda: replace(three, methods=("full",)),
        "prompt": lambda: replace(three, settings=replace(SETTINGS, prompt="{question} now")),
        "data": lambda: replace(three, data=str(write_rows(tmp_path, [{"image": "a.png", "question": "?"}]))),
    }[change]()
    with pytest.raises(ResumeError, match=f"another command .*{change}.* differ"):
        run(other, folder)


def test_parquet_in_and_out_gives_the_same_rows(cluster, answered, questions, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = []
    for line in map(json.loads, questions.read_text("utf-8").splitlines()):
        rows.append({**line, "image": {"bytes": (questions.parent / line["image"]).read_bytes(), "path": None}})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=64)
    summary = run(job(tmp_path / "data.parquet"), tmp_path / "out", "parquet")
    assert summary["parts"] == 10  # 64 rows in parts of 30: 30 + 30 + 4
    table = parquet.read_table(tmp_path / "out/answers").to_pylist()
    _, folder, _ = answered
    expected = {a["id"]: a["answer"] for a in lines(folder) if a["method"] == METHODS[1]}
    assert {row["id"]: row["answer"] for row in table} == expected
    assert Counter(row["id"] for row in table) == Counter(ids(questions))


def test_broken_images_and_lines_are_counted_and_nothing_is_lost(cluster, questions, tmp_path):
    whole = (questions.parent / "images/0.png").read_bytes()
    (tmp_path / "whole.png").write_bytes(whole)
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])  # the header is whole: found when it is decoded
    (tmp_path / "text.png").write_text("no image")
    names = ["whole.png", "cut.png", "missing.png", "text.png", "whole.png"]
    rows = [{"id": n, "image": name, "question": "is there a star?"} for n, name in enumerate(names)]
    write_rows(tmp_path, [*rows, {"id": 5, "image": "whole.png", "question": "the <image> is?"}])
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write("no JSON\n")
    summary = run(job(tmp_path / "data.jsonl", "full", "vtc-cls(keep=36)"), tmp_path / "out")
    assert (summary["rows"], summary["errors"], summary["answers"]) == (7, 5, 4)
    for method in ("full", "vtc-cls(keep=36)"):
        errors = {a["source"]: a["error"] for a in lines(tmp_path / "out") if a["method"] == method}
        good = [source for source, error in errors.items() if error is None]
        assert good == ["data.jsonl:1", "data.jsonl:5"]
        assert "cut.png" in errors["data.jsonl:2"]
        assert errors["data.jsonl:3"] == "missing.png: no such image file"
        assert "not an image" in errors["data.jsonl:4"]
        assert "leave <image> out" in errors["data.jsonl:6"]
        assert "not valid JSON" in errors["data.jsonl:7"]
    assert str(tmp_path) not in json.dumps(lines(tmp_path / "out"))


def test_a_killed_worker_loses_and_repeats_no_row(cluster, questions, tmp_path):
    killed = []

    def kill_once(done, total, label):
        if done and not killed:
            killed.extend(workers_of(os.getpid())[:1])
            kill(killed[0])

    summary = run(job(questions), tmp_path, place=Place(workers=2), progress=kill_once)
    assert killed
    assert summary["rows"] == summary["rows_of_this_call"] == ROWS
    assert_every_row_once(tmp_path, questions)


def test_a_worker_that_always_dies_ends_the_run_with_one_line(cluster, questions, tmp_path, monkeypatch):
    """Ray starts it again; the rounds end after some that answer nothing."""

    class Deadly:
        def __init__(self, job, threads):
            pass

        def __call__(self, block):
            os._exit(9)

    monkeypatch.setattr("tokensieve.batch.rounds.ROUNDS", 1)
    monkeypatch.setattr("tokensieve.batch.rounds.Worker", Deadly)
    with pytest.raises(
        Refusal, match=r"210 rows have no answer: their workers ended without an error 1 times in a row"
    ):
        run(replace(job(questions), rows_per_part=ROWS), tmp_path / "out")


def test_workers_that_cannot_start_are_named_with_the_reason(cluster, questions, tmp_path, monkeypatch):
    class NotInstalled:
        """A worker on a node that lacks a package."""

        def __init__(self, job, threads):
            import nowhere  # noqa: F401

        def __call__(self, block):
            return block

    monkeypatch.setattr("tokensieve.batch.rounds.ROUNDS", 1)
    monkeypatch.setattr("tokensieve.batch.rounds.Worker", NotInstalled)
    with pytest.raises(Refusal, match=r"210 rows have no answer: .*No module named 'nowhere'"):
        run(job(questions), tmp_path)


def test_a_killed_and_a_terminated_driver_are_resumed_with_every_row_once(cluster, questions, tmp_path):
    program = [
        *(sys.executable, "-m", "tokensieve", "batch", "--data", str(questions), "--output", str(tmp_path)),
        *("--methods", "vtc-cls", "--keep", "36", "--max-new-tokens", "4", "--rows-per-part", str(PER_PART)),
    ]

    def parts() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("answers/part-*")}

    killed = subprocess.Popen(program, stderr=subprocess.DEVNULL)
    wait_for(parts)
    killed.kill()
    killed.wait()
    first = parts()
    joined = [*program, "--address", cluster.address]
    terminated = subprocess.Popen(joined, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(parts()) > len(first))
    terminated.terminate()
    _, errors = terminated.communicate(timeout=60)
    assert terminated.returncode == 130
    assert errors.splitlines()[-1] == "tokensieve: interrupted; resume with the same command"
    second = parts()
    assert not list(tmp_path.glob("**/.*.tmp"))
    assert 1 <= len(first) < len(second) < ROWS // PER_PART
    summary = run(job(questions), tmp_path)  # the same command, from Python
    assert summary["rows"] == ROWS
    assert summary["rows_of_this_call"] == ROWS - PER_PART * len(second)
    assert_every_row_once(tmp_path, questions)
    assert first.items() <= second.items() <= parts().items(), "no part is answered twice"


def full_disk(folder: Path, monkeypatch) -> bool:
    """Mount a small disk at the folder; without the right to, make each third write fail. Return whether it is one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        return True
    sync, calls = os.fsync, []

    def fail(file):
        calls.append(file)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", fail)
    return False


def test_a_full_disk_ends_with_one_line_and_the_run_goes_on_later(cluster, questions, tmp_path, monkeypatch):
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    mounted = full_disk(disk, monkeypatch)
    try:
        with pytest.raises(OutputError, match=r"No space left on device; all parts written before are whole"):
            run(job(questions), disk)
        parts = sorted(disk.glob("answers/part-*"))
        assert 1 <= len(parts) < ROWS // PER_PART
        assert len(lines(disk)) == PER_PART * len(parts)
        assert not list(disk.glob("**/.*.tmp"))
        subprocess.run(["cp", "-r", str(disk), str(copy)], check=True)  # to a larger disk
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)
    monkeypatch.undo()
    summary = run(job(questions), copy)
    assert summary["rows_of_this_call"] == ROWS - PER_PART * len(parts)
    assert_every_row_once(copy, questions)


def test_a_users_mistake_in_a_worker_is_one_line(questions):
    worker = Worker(job(questions, "fastv(layer=99, keep=36)"), 1)
    (text,) = worker({"part": [json.dumps(vars(job(questions).parts()[0]))]})["outcome"]
    assert "layer" in json.loads(text)["refusal"]


def test_a_bug_in_a_worker_keeps_its_traceback(questions, monkeypatch):
    worker = Worker(job(questions), 1)
    monkeypatch.setattr(worker.model, "answer", lambda samples: 1 / 0)
    (text,) = worker({"part": [json.dumps(vars(job(questions).parts()[0]))]})["outcome"]
    assert "ZeroDivisionError" in json.loads(text)["bug"]


def test_data_without_readable_rows_are_refused_before_a_worker_starts(questions, tmp_path):
    with pytest.raises(DataError, match=r"none of the first 30 rows .*did you mean 'question'"):
        run(replace(job(questions), columns=replace(job(questions).columns, question="questions")), tmp_path)


def test_a_node_killed_in_the_middle_loses_and_repeats_no_row(cluster, questions, tmp_path):
    second, killed = cluster.add_node(num_cpus=1), []

    def kill_once(done, total, label):
        if done >= ROWS // 3 and not killed:
            killed.append(done)
            cluster.remove_node(second, allow_graceful=False)

    summary = run(replace(job(questions), rows_per_part=10), tmp_path, place=Place(workers=3), progress=kill_once)
    assert killed
    assert killed[0] < ROWS
    assert summary["rows"] == ROWS
    assert_every_row_once(tmp_path, questions)


def test_a_worker_that_outlives_its_pool_ends_with_the_round(cluster):
    """Ray starts a worker again that was killed; nothing of Ray Data's holds it any more."""
    import ray

    from tokensieve.batch import rounds

    class Echo:
        def __call__(self, block):
            return block

    # Ray learns late of the node that the test before killed
    wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)
    in_round = rounds._start_round()
    worker = ray.remote(num_cpus=1, max_restarts=-1)(rounds._WorkerInRound).remote(in_round, Echo)
    assert ray.get(worker.__call__.remote({"part": []})) == {"part": []}
    ray.kill(in_round)

    def dead() -> bool:
        try:
            ray.get(worker.__call__.remote({}), timeout=60)
        except ray.exceptions.ActorDiedError:
            return True
        except ray.exceptions.ActorUnavailableError:  # Ray is starting it again
            pass
        return False

    wait_for(dead)
    wait_for(lambda: ray.available_resources().get("CPU") == 2)
