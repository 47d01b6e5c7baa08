"""The exported questions are those of the data, and ``compare`` reads them as well."""

import csv
import runpy
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.cli.calling import run, run_many
from tests.harness.running import read_lines
from tokensieve.evaluate.data import load_data


def test_the_exported_questions_are_those_of_the_benchmark(tmp_path: Path) -> None:
    outcome = run("harness", "export", tmp_path, "--limit", "20", "--name", "mine", "--max-new-tokens", "9")
    assert (outcome.code, outcome.out) == (0, ""), outcome.err
    loaded, copies = load_data("reference", limit=20), load_data(tmp_path / "questions.jsonl")
    samples = [sample for sample in loaded if not sample.turns]
    assert 10 < len(samples) < len(loaded)
    assert f"{len(loaded) - len(samples)} of 20, in a later turn, are left out" in outcome.err
    for sample, copy in zip(samples, copies, strict=True):
        assert (sample.id, sample.text, sample.answers) == (copy.id, copy.text, copy.answers)
        for image, copied in zip(sample.open_all(), copy.open_all(), strict=True):
            assert image.tobytes() == copied.tobytes(), "PNG loses nothing"
    assert len(list((tmp_path / "images").iterdir())) == len({picture for s in samples for picture in s.images})
    for harness, length in (("lmms_eval", "max_new_tokens"), ("lm_eval", "max_gen_toks")):
        text = (tmp_path / harness / "mine.yaml").read_text("utf-8")
        task = yaml.safe_load(text.replace("!function ", ""))
        assert (task["task"], task["generation_kwargs"][length]) == ("mine", 9)
        assert load_data(task["dataset_kwargs"]["data_files"]["test"]) == copies
    with (tmp_path / "vlmevalkit" / "mine.tsv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    assert [row["id"] for row in table] == [sample.id for sample in samples]
    assert Path(table[0]["image_path"]).is_absolute()


def test_the_functions_of_a_task(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    question = '{"image": ["a.png", "a.png"], "question": "same?", "answer": "yes", "choices": ["yes", "no"]}\n'
    (tmp_path / "mine.jsonl").write_text(question, "utf-8")
    outcome = run("harness", "export", "out", "--data", "mine.jsonl", "--metric", "choice", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    (row,) = read_lines(tmp_path / "out" / "questions.jsonl")
    functions = runpy.run_path(str(tmp_path / "out" / "lm_eval" / "functions.py"))
    assert [image.size for image in functions["images"](row)] == [(8, 8), (8, 8)]
    assert functions["text"](row) == "same?\nA. yes\nB. no"
    assert functions["text_with_images"](row) == "<image><image>same?\nA. yes\nB. no"
    assert functions["score"](row, ["A"]) == {"choice": 1.0}
    assert functions["score"](row, ["B"]) == {"choice": 0.0}


def test_refusals(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name, question in (("fine", "what?"), ("placed", "what is in <image>?")):
        row = f'{{"image": "a.png", "question": "{question}", "answer": "x"}}\n'
        (tmp_path / f"{name}.jsonl").write_text(row, "utf-8")
    fine = ["harness", "export", tmp_path / "out", "--data", tmp_path / "fine.jsonl"]
    outcomes = run_many(
        {
            "metric": [*fine, "--metric", "best"],
            "name": [*fine, "--name", "my task"],
            "text": ["harness", "export", tmp_path / "out", "--data", tmp_path / "placed.jsonl"],
        }
    )
    assert outcomes["metric"].refused().startswith("tokensieve: metric must be one of exact, ")
    assert outcomes["name"].refused() == "tokensieve: a task's name is letters, digits and _; got 'my task'"
    assert "placed.jsonl, line 1: lm-eval puts an image where a text has <image>" in outcomes["text"].refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "package"), [("lm-eval", "lm_eval"), ("vlmevalkit", "vlmeval")])
def test_a_harness_that_is_not_installed_is_named(command: str, package: str) -> None:
    before = f"import sys; sys.modules[{package!r}] = None\n"
    outcome = run_many({"run": ["harness", command]}, before=before)["run"]
    assert "is not installed in this environment: pip install" in outcome.refused()
