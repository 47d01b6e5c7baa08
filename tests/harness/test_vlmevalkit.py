"""VLMEvalKit: the answers are those of ``compare``, and an error that it would skip ends the run."""

import json
from pathlib import Path

import pandas
import pytest

from tests.harness.running import Bench, Outcome, check_run, command, failing


def run(bench: Bench, output: Path, *options: object, data: str = "tokensieve_bench", processes: int = 1) -> Outcome:
    return command(
        "tokensieve", "harness", "vlmevalkit", *options, "--max-new-tokens", 16, "--work-dir", output,
        "--data", data, "--mode", "infer", processes=processes, LMUData=str(bench.folder / "vlmevalkit"),
    )  # fmt: skip


def check(bench: Bench, folder: Path, spec: str, processes: int = 1) -> None:
    table = pandas.read_excel(folder / "tokensieve_tokensieve_bench.xlsx", dtype=str, keep_default_na=False)
    answers = dict(zip(table["id"], table["prediction"], strict=True))
    record = json.loads((folder / "status.json").read_text("utf-8"))["tokensieve"]
    check_run(answers, record, spec, bench, processes)


@pytest.mark.parametrize("spec", ["full", "trsm(keep=36)"])
def test_the_answers_are_those_of_compare(spec: str, bench: Bench, tmp_path: Path) -> None:
    outcome = run(bench, tmp_path, "--method", spec)
    assert outcome.code == 0, outcome.err
    check(bench, tmp_path / "tokensieve", spec)


@pytest.mark.parametrize("spec", ["vtc-cls(keep=36)", "fastv(keep=36, layer=1)"])
def test_two_processes_give_the_same_result(spec: str, bench: Bench, tmp_path: Path) -> None:
    outcome = run(bench, tmp_path, "--method", spec, processes=2)
    assert outcome.code == 0, outcome.err
    check(bench, tmp_path / "tokensieve", spec, processes=2)


def test_an_error_ends_the_run(bench: Bench, tmp_path: Path) -> None:
    outcome = run(bench, tmp_path, "--method", failing(tmp_path, "MemoryError('no room')"))
    assert outcome.code == 2
    assert outcome.own_lines == ["tokensieve: memory ran out; use a smaller batch size or a smaller budget (no room)"]


def test_a_data_set_that_vlmevalkit_skips_ends_with_a_line(bench: Bench, tmp_path: Path) -> None:
    outcome = run(bench, tmp_path, data="tokensieve_nowhere")
    assert outcome.code == 2
    assert outcome.own_lines == ["tokensieve: VLMEvalKit skipped tokensieve_nowhere: invalid_dataset"]
