"""``tokensieve tune`` through the real command: killed, resumed, asked again, and given wrong inputs."""

import json
from pathlib import Path

import pytest

from tests.cli.calling import run_many
from tests.tune.conftest import SEARCH, answers_in, needs_weights, run
from tokensieve.methods.spec_file import DEFAULTS, SpecFile


@needs_weights
def test_a_killed_search_continues_and_answers_in_one_screen(search_folder: Path, resumed) -> None:
    before, outcome = resumed
    assert outcome.code == 0, outcome.err
    result = json.loads((search_folder / "tune.json").read_text("utf-8"))
    assert result["verdict"] == "use"
    assert f"Use {result['chosen']['spec']}" in outcome.out
    assert "with 95 %" in outcome.out
    assert "allowed is 20.00%" in " ".join(outcome.out.replace("│", " ").split())
    assert len(outcome.out.splitlines()) < 25
    assert max(map(len, outcome.out.splitlines())) <= 100
    assert f"spec file: {search_folder / 'best.json'}" in outcome.err
    after = answers_in(search_folder)
    assert len(before) > 50
    assert after[: len(before)] == before, "answers from before the end of the process are kept"
    assert len(after) == len({row[:2] for row in after}), "no question is answered twice"


@needs_weights
def test_the_choice_holds_on_questions_that_the_search_did_not_see(search_folder: Path, resumed) -> None:
    result = json.loads((search_folder / "tune.json").read_text("utf-8"))
    chosen, rows = result["chosen"], answers_in(search_folder)
    asked = {run: {sample for other, sample, _ in rows if other == run} for run in {row[0] for row in rows}}
    least = min(len(samples) for samples in asked.values())
    assert least < result["search_questions"], "some configurations leave the race early"
    judged = {finalist["spec"] for finalist in result["tested"]}
    held_out = asked["full"] - max((s for run, s in asked.items() if run != "full" and run not in judged), key=len)
    assert len(held_out) >= result["held_out_questions"] == chosen["drop"]["questions"]
    exhaustive = (result["candidates"] + 1) * 140
    assert result["answers"] == len(rows) < 0.6 * exhaustive
    assert chosen["holds"]
    assert chosen["drop"]["high"] <= 0.2
    assert 0 < chosen["flops"] < 1
    assert chosen["tokens_after"] < chosen["tokens_before"]


@needs_weights
def test_the_same_command_again_answers_nothing_new(search_folder: Path, resumed) -> None:
    before, result = answers_in(search_folder), json.loads((search_folder / "tune.json").read_text("utf-8"))
    again = run(*SEARCH, "--output", search_folder, "--json")
    assert again.code == 0, again.err
    assert answers_in(search_folder) == before
    printed = json.loads(again.out)
    assert printed == result


@needs_weights
def test_reduction_that_loses_too_much_is_not_recommended(tmp_path: Path) -> None:
    options = ["--questions", "105", "--methods", "pool(keep=9)", "--max-new-tokens", "4", "--batch-size", "35"]
    outcome = run("tune", "--max-drop", "5%", *options, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "Do not reduce: no configuration holds the bound" in outcome.out
    assert not (tmp_path / "out" / "best.json").exists()


@needs_weights
def test_a_bound_proves_nothing_where_the_full_model_is_wrong_already(tmp_path: Path) -> None:
    rows = []
    for number in range(24):
        (tmp_path / f"{number}.png").write_bytes(_png(number))
        rows.append({"image": f"{number}.png", "question": "what colour is the ball?", "answer": "never this"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", tmp_path / "data.jsonl", "--methods", "pool(keep=36)", "--max-new-tokens", "4"]
    outcome = run("tune", "--max-drop", "20%", *options, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    text = " ".join(outcome.out.replace("│", " ").split())
    assert "Do not reduce: the full model fails" in text
    assert "answers 0.00% of the held-out questions right" in text
    assert not (tmp_path / "out" / "best.json").exists()


@needs_weights
def test_answers_that_need_no_question(tmp_path: Path) -> None:
    options = ["--methods", "divprune", "--keep", "25%", "--max-new-tokens", "4"]
    outcomes = run_many(
        {
            "few": ["tune", "--max-drop", "1%", "--questions", "70", *options, "--output", tmp_path / "few"],
            "slow": ["tune", "--max-drop", "20%", "--max-latency", "0.01ms", *options, "--output", tmp_path / "slow"],
        }
    )
    few, slow = outcomes["few"], outcomes["slow"]
    assert few.code == slow.code == 0, few.err + slow.err
    text = " ".join(few.out.replace("│", " ").split())
    assert "too few questions" in text
    assert "that takes 316, and 582 questions in all" in text
    assert "not faster" in slow.out
    assert "within 0.01 ms" in " ".join(slow.out.replace("│", " ").split())
    assert answers_in(tmp_path / "few") == answers_in(tmp_path / "slow") == []


WRONG = {
    "no bound": ([], "Missing option '--max-drop'"),
    "bound of 500 %": (["--max-drop", "5"], "max_drop is a share of the questions above 0, up to 0.5"),
    "bound of nothing": (["--max-drop", "0%"], "above 0, up to 0.5 (1% is 0.01); got 0.0"),
    "bound in words": (["--max-drop", "little"], "--max-drop is a share such as 1% or 0.01; got 'little'"),
    "nan": (["--max-drop", "nan"], "got nan"),
    "latency": (["--max-drop", "1%", "--max-latency", "2s"], "(60%, 0.6) or a time (12ms); got '2s'"),
    "latency, before the model": (
        ["--max-drop", "1%", "--max-latency", "fast", "--model", "nowhere/model"],
        "a largest latency is a share below 100% (60%, 0.6) or a time (12ms); got 'fast'",
    ),
    "latency above full": (["--max-drop", "1%", "--max-latency", "120%"], "a share below 100%"),
    "missing file": (["--max-drop", "1%", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "unknown method": (["--max-drop", "1%", "--methods", "vtc-clz"], "did you mean vtc-cls?"),
    "unknown parameter": (["--max-drop", "1%", "--methods", "fastv(leyer=1)"], "did you mean layer"),
    "budget": (["--max-drop", "1%", "--keep", "150%"], "keep must be"),
    "metric": (["--max-drop", "1%", "--metric", "f1"], "unknown metric 'f1'"),
    "scope": (
        ["--max-drop", "1%", "--methods", "divprune", "--budget-scope", "sample-score"],
        "sample-score",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("wrong")
    picture = folder / "photo.png"
    picture.write_bytes(_png())
    (folder / "one.jsonl").write_text(json.dumps({"image": "photo.png", "question": "what?", "answer": "red"}) + "\n")
    (folder / "file").write_text("not a folder")
    output = ["--output", str(folder / "out")]
    calls = {name: ["tune", *arguments, *output] for name, (arguments, _) in WRONG.items()}
    calls["one question"] = ["tune", "--max-drop", "10%", "--data", str(folder / "one.jsonl"), *output]
    calls["output is a file"] = ["tune", "--max-drop", "20%", "--questions", "70", "--output", str(folder / "file")]
    file = folder / "repaired.json"
    file.write_text(json.dumps(SpecFile("divprune", 9, DEFAULTS | {"repair": "size"}).to_json()))
    with_file = ["tune", "--max-drop", "1%", "--methods", str(file), "--model", "nowhere/model", *output]
    calls["options of a spec file"] = with_file
    calls["other options than a spec file's"] = [*with_file, "--repair", "restore"]
    return run_many(calls)


def _png(red: int = 255) -> bytes:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (20, 20), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(refusals, name: str) -> None:
    assert WRONG[name][1] in refusals[name].refused()


def test_the_options_of_a_spec_file_hold_and_others_are_refused_before_loading(refusals) -> None:
    assert "no model nowhere/model" in refusals["options of a spec file"].refused()
    line = refusals["other options than a spec file's"].refused()
    assert "repaired.json says repair='size'; got repair='restore'" in line


@needs_weights
def test_one_question_and_a_file_for_a_folder_are_refused(refusals) -> None:
    assert "at least two images, one of them held out; got 1 question about 1" in refusals["one question"].refused()
    assert "cannot use the output folder" in refusals["output is a file"].refused()
