"""``tokensieve reproduce`` through the real command: every recipe on its toy data, and wrong input."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.cli.calling import Outcome, run_many
from tests.cli.conftest import model  # noqa: F401  # a fixture
from tests.reproduce.toys import TOYS, write
from tokensieve.reproduce import BENCHMARKS, published_rows

# a row for each recipe: of vtc-cls if there is one
ROWS = {
    row.benchmark: row.name
    for method in ("full", "divprune", "vtc-cls")
    for row in published_rows()
    if (row.model, row.method) == ("llava-1.5-7b", method) and row.tokens in (None, 64)
}
OFFLINE = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reproduce")


@pytest.fixture(scope="module")
def outcomes(folder: Path, model: str) -> dict[str, Outcome]:  # noqa: F811
    """Run each recipe once, one of them again, and one with fewer questions."""
    calls = {}
    for name in BENCHMARKS:
        write(name, folder / name)
        options = ["--model", model, "--data", folder / name, "--output", folder / f"{name}-out", "--json"]
        calls[name] = ["reproduce", ROWS[name], *options]
    table = ["reproduce", ROWS["pope"], "--model", model, "--data", folder / "pope"]
    calls["again"] = [*table, "--output", folder / "pope-out"]
    calls["fewer"] = [*table, "--output", folder / "fewer", "--limit", "4", "--json"]
    return run_many(calls)


def test_every_recipe_has_a_row_and_toy_data():
    assert set(ROWS) == set(BENCHMARKS) == set(TOYS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_recipe_runs(name, outcomes, folder):
    assert outcomes[name].code == 0, outcomes[name].err
    done = json.loads(outcomes[name].out)
    assert done == json.loads((folder / f"{name}-out" / "reproduction.json").read_text("utf-8"))
    benchmark = BENCHMARKS[name]
    assert done["name"] == ROWS[name]
    verdicts = [*done["absolute"], *done["relative"]]
    assert verdicts
    assert {verdict["answer"] for _, verdict in verdicts} == {"cannot tell"}  # the bundled model is not the papers'
    assert all("this model is not LLaVA-1.5-7B" in verdict["reason"] for _, verdict in verdicts)
    if benchmark.judge:
        assert done["numbers"] == []
        return
    assert done["samples"] == len(json.loads((folder / f"{name}-out" / "results.json").read_text("utf-8"))["questions"])
    for number in done["numbers"]:
        assert 0 <= number["low"] <= number["value"] + 1e-9
        assert number["value"] <= number["high"] + 1e-9 <= benchmark.scale + 1e-6
    methods = [number["method"] for number in done["numbers"]]
    expected = ["full"] if ROWS[name].endswith("/full") else ["full", ROWS[name].split("/")[2].split("@")[0], "random"]
    assert methods == expected
    assert done["numbers"][-1]["tokens"] == (64 if len(methods) == 3 else done["numbers"][0]["tokens"])


def test_judged_benchmarks_write_files_for_the_judge(outcomes, folder):
    by_id = json.loads((folder / "mm-vet-out" / "answers-1.json").read_text("utf-8"))
    assert set(by_id) == {"v1_0", "v1_1"}
    text = (folder / "llava-bench-out" / "answers-0.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["question_id"] for line in lines] == ["v1_0", "v1_1"]
    assert {line["prompt"] for line in lines} == {"Describe it."}
    assert len(json.loads(outcomes["mm-vet"].out)["answer_files"]) == 3


def test_the_prompt_reaches_the_model_with_its_suffix(folder, outcomes):
    setup = json.loads((folder / "pope-out" / "predictions.jsonl").read_text("utf-8").splitlines()[0])["setup"]
    assert setup["max_new_tokens"] == 128
    assert setup["positions"] == "contiguous"
    assert BENCHMARKS["pope"].prompt.endswith("Answer the question using a single word or phrase.")


def test_the_same_command_continues(folder, outcomes):
    """The second call prints the table of the first one's answers, and answers nothing again."""
    again, first = outcomes["again"], json.loads(outcomes["pope"].out)
    assert again.code == 0, again.err
    lines = (folder / "pope-out" / "predictions.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 1 + 3 * 6
    number = first["numbers"][1]
    assert f"{number['value']:.1f} ({number['low']:.1f} to {number['high']:.1f})" in again.out
    assert "published 78.8 [1], ours" in again.out
    assert "cannot tell: this model is not LLaVA-1.5-7B" in again.out
    assert "[1] VTC-CLS (arXiv:2412.05819)" in again.out


def test_a_limit(outcomes):
    assert json.loads(outcomes["fewer"].out)["samples"] == 4


@pytest.fixture(scope="module")
def others(folder: Path) -> dict[str, Outcome]:
    """Make calls that load no model: lists, plans and wrong input."""
    write("textvqa", folder / "plan")
    broken = folder / "broken" / "data"
    broken.mkdir(parents=True)
    table = parquet.read_table(write("pope", folder / "whole") / "data/test-00000-of-00002.parquet")
    parquet.write_table(table.drop_columns(["category"]), broken / "test-00000-of-00001.parquet")
    odd = folder / "odd" / "data"
    odd.mkdir(parents=True)
    rows = [row | {"answer": "maybe"} for row in table.to_pylist()]
    parquet.write_table(pa.Table.from_pylist(rows), odd / "test-00000-of-00001.parquet")
    (folder / "empty").mkdir()
    pope, here = "llava-1.5-7b/pope/vtc-cls@64", ["--model", "reference", "--output", folder / "unused"]
    return run_many(
        {
            "list": ["reproduce"],
            "some": ["reproduce", "pope/vtc", "--list"],
            "none": ["reproduce", "nothing-of-this", "--list"],
            "json": ["reproduce", "--list", "--json"],
            "plan": ["reproduce", "llava-1.5-7b/textvqa/fastv@64", "--dry-run", "--data", folder / "plan"],
            "plan json": ["reproduce", pope, "--dry-run", "--json"],
            "plan judged": ["reproduce", "llava-1.5-7b/mm-vet/vtc-cls@64", "--dry-run", "--json"],
            "model": ["reproduce", "llava-1.5-8b/pope/vtc-cls@64"],
            "benchmark": ["reproduce", "llava-1.5-7b/popes/vtc-cls@64"],
            "method": ["reproduce", "llava-1.5-7b/pope/vtc-clz@64"],
            "tokens": ["reproduce", "llava-1.5-7b/pope/vtc-cls@65"],
            "no network": ["reproduce", pope],
            "no folder": ["reproduce", pope, *here, "--data", folder / "missing"],
            "no file": ["reproduce", pope, *here, "--data", folder / "empty"],
            "no column": ["reproduce", pope, *here, "--data", folder / "broken"],
            "odd answer": ["reproduce", pope, *here, "--data", folder / "odd"],
        },
        before=OFFLINE,
    )


def test_the_list(others):
    lines = others["list"].out
    for name in BENCHMARKS:
        assert f" {name} " in lines
    assert "llava-1.5-7b/pope/vtc-cls@64" in lines
    some = [line for line in others["some"].out.splitlines() if line.startswith("llava")]
    assert [line.split()[:3] for line in some] == [
        ["llava-1.5-7b/pope/vtc-cls@256", "86.2", "85.9"],
        ["llava-1.5-7b/pope/vtc-cls@128", "84", "85.9"],
        ["llava-1.5-7b/pope/vtc-cls@64", "78.8", "85.9"],
    ]
    assert len(json.loads(others["json"].out)) == len(published_rows())
    assert others["none"].refused() == "tokensieve: no published row with 'nothing-of-this' in its name"


def test_a_dry_run_shows_the_plan_and_a_prompt(others, folder):
    out = others["plan"].out
    assert others["plan"].code == 0, others["plan"].err
    assert "full, fastv at 64 tokens, random" in out
    assert "64 tokens on average over the LLM's layers" in out
    assert "USER: <image>\nWhat does it say?\nReference OCR token: STOP, now\nAnswer the question using" in out
    facts = json.loads(others["plan json"].out)
    assert facts["data"].startswith("lmms-lab-encoder/POPE (test), size unknown: the hub gives no list")
    assert facts["questions"] == "9,000"
    assert facts["published"] == ["78.8 (VTC-CLS (arXiv:2412.05819), also in the README of its code.)"]
    judged = json.loads(others["plan judged"].out)
    assert judged["metric"] == "none here: the answers are written for GPT-4 (the evaluator of MM-Vet)"
    assert not (folder / "unused").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("model", "unknown model 'llava-1.5-8b'; did you mean llava-1.5-7b"),
        ("benchmark", "unknown benchmark 'popes'; did you mean pope"),
        ("method", "'vtc-clz'"),
        ("tokens", "no published number of vtc-cls at 65 tokens on POPE with LLaVA-1.5-7B; published: vtc-cls@64"),
        ("no network", "no data set lmms-lab-encoder/POPE: the hub does not give it"),
        ("no folder", "no such folder; --data takes a folder of files as on the hub"),
        ("no file", "no file data/test-*.parquet, as in lmms-lab-encoder/POPE on the hub"),
        ("no column", "test-00000-of-00001.parquet, row 1: POPE has a column 'category'"),
        ("odd answer", "the metric yes_no needs the answer yes or no; got 'maybe'"),
    ],
)
def test_wrong_input_is_one_line(call, message, others):
    assert message in others[call].refused()
