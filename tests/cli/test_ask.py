"""``ask`` and ``bench``: one image, without and with a method."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.calling import Outcome, run, run_many

QUESTION = "what colour is the cup?"


@pytest.fixture(scope="module")
def outcomes(model: str, photo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("ask")
    contributing = Path(__file__).parents[2].joinpath("CONTRIBUTING.md").read_text("utf-8")
    example = re.search(r"```python\n(.*?)```", contributing, re.S)
    assert example is not None
    (folder / "own.py").write_text(example[1], "utf-8")
    (folder / "buggy.py").write_text(
        example[1].replace("return image", "return {}['gone']  # image").replace('"loudest"', '"buggy"')
    )
    record = {"image": str(photo), "question": QUESTION, "answer": "red"}
    (folder / "own.jsonl").write_text(json.dumps(record), "utf-8")
    once = ["--repeats", "1"]
    ask = ["ask", photo, QUESTION, "--model", model, "--max-new-tokens", "4"]
    return run_many({
        "text": [*ask, "--overlay", folder / "kept.png"],
        "json": [*ask, "--method", "trsm(query='prompt')", "--keep", "25%", "--json"],
        "merged": [*ask, "--method", "downsample(keep=64) + pool(keep=16)", "--overlay", folder / "pool.png", "--json"],
        "contiguous": [*ask, "--method", "uniform", "--keep", "9", "--positions", "contiguous", "--json"],
        "own": [*ask, "--method", f"{folder}/own.py:Loudest", "--keep", "16", "--json"],
        "buggy": [*ask, "--method", f"{folder}/buggy.py:Loudest"],
        "bench": ["bench", "--model", model, "--methods", "vtc-cls, pool(keep=9)", "--keep", "36, 11%",
                  "--answer-tokens", "7", *once],
        "own data": ["compare", "--model", model, "--data", folder / "own.jsonl", "--methods", "uniform", "--keep", "9",
                     "--no-measure", "--no-report", "--max-new-tokens", "2", "--output", folder / "out"],
        "bench of a photo": ["bench", "--model", model, "--image", photo, "--methods", "uniform", "--keep", "9", *once],
        "bench classifier": ["bench", "--model", "pumer-reference", *once, "--json"],
        "bench classifier table": ["bench", "--model", "vilt-reference", "--methods", "pumer(layers=(2, 4))", *once],
        "bench json": ["bench", "--model", model, "--methods", "vtc-cls", "--keep", "36", *once, "--json"],
    })  # fmt: skip


def test_text_shows_both_answers_and_saves_the_overlay(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    outcome = outcomes["text"]
    assert outcome.code == 0, outcome.err
    first, second = outcome.out.splitlines()
    assert re.match(r"full model +144 tokens  ", first)
    assert re.match(r"vtc-cls\(keep=64\) +64 tokens  ", second)
    (path,) = re.findall(r"overlay: (.+)", outcome.err)
    with Image.open(path) as picture:
        assert picture.size == (480, 480)


def test_stdout_holds_only_the_json(outcomes: dict[str, Outcome]) -> None:
    answered = json.loads(outcomes["json"].out)
    assert list(answered) == [
        "question", "right_answer", "method", "answer_full", "answer", "tokens_before", "tokens_after", "notes",
        "image", "overlay",
    ]  # fmt: skip
    assert answered["question"] == QUESTION
    assert answered["method"] == "trsm(keep=0.25, query='prompt')"
    assert (answered["tokens_before"], answered["tokens_after"]) == (144, 36)


def test_stages_positions_and_own_methods(outcomes: dict[str, Outcome]) -> None:
    merged, contiguous, own = (json.loads(outcomes[name].out) for name in ("merged", "contiguous", "own"))
    assert merged["tokens_after"] == 16
    assert Path(merged["overlay"]).is_file()
    assert contiguous["tokens_after"] == 9
    assert own["method"] == "loudest(keep=16)"
    assert own["tokens_after"] == 16


def test_the_bundled_model_says_that_it_does_not_know_a_photo(outcomes: dict[str, Outcome], model: str) -> None:
    if model != "reference":
        pytest.skip("no trained weights")
    for name in ("text", "json", "bench of a photo", "own data"):
        assert outcomes[name].code == 0
        assert outcomes[name].err.count("'reference' knows only its own drawn scenes") == 1
    assert "drawn scenes" not in outcomes["bench"].err


def test_without_arguments_a_scene_is_asked_about(model: str, tmp_path: Path) -> None:
    """The first command that a user tries: a question with a known answer, and where the pictures are."""
    outcome = run("ask", "--model", model, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    question, right, full, reduced = outcome.out.splitlines()
    assert question.startswith("question")
    assert question.endswith("?")
    answer = right.split()[-1]
    assert reduced.startswith("vtc-cls(keep=64)")
    if model == "reference":
        assert (full.split()[-1], reduced.split()[-1]) == (answer, answer)
    paths = {name: Path(path) for name, path in re.findall(r"^(scene|overlay): +(.+)$", outcome.err, re.M)}
    assert paths == {"scene": Path("runs/ask/scene.png"), "overlay": Path("runs/ask/kept.png")}
    with Image.open(tmp_path / paths["scene"]) as scene, Image.open(tmp_path / paths["overlay"]) as overlay:
        assert scene.size == (120, 120)
        assert overlay.size == (480, 480)
    (tmp_path / "runs" / "ask" / "scene.png").unlink()
    (tmp_path / "runs" / "ask" / "scene.png").mkdir()
    assert "cannot save a picture as runs/ask/scene.png" in run("ask", "--model", model, cwd=tmp_path).err


def test_a_scene_is_shown_to_any_model(tmp_path: Path) -> None:
    outcome = run("ask", "--model", "vilt-reference", "--method", "pumer(layers=(2, 4))", "--json", cwd=tmp_path)
    assert json.loads(outcome.out)["right_answer"] == "green"
    assert outcome.err == ""


def test_a_bug_keeps_its_traceback(outcomes: dict[str, Outcome]) -> None:
    buggy = outcomes["buggy"]
    assert buggy.code == 1
    assert "Traceback" in buggy.err
    assert "KeyError: 'gone'" in buggy.err


def test_bench_prints_a_row_per_method_and_budget(outcomes: dict[str, Outcome]) -> None:
    lines = outcomes["bench"].out.splitlines()
    for name in ("full", "vtc-cls(keep=36)", "vtc-cls(keep=0.11)", "pool(keep=9)"):
        assert sum(line.strip().startswith(name) for line in lines) == 2  # times; sizes and throughput
    assert "the prefill and 7 tokens after the first" in outcomes["bench"].out
    assert re.fullmatch(
        r"note: the times are uncertain: .*1 round cannot show a spread.*", outcomes["bench"].err.strip()
    )
    full, reduced = json.loads(outcomes["bench json"].out)
    assert (full["break_even"], reduced["break_even"]) == (None, "not told apart")
    assert "1 round" in reduced["timing_note"]
    requests = reduced["prefill_ms"]["median"] + 64 * reduced["decode_ms_per_token"]["median"]
    assert reduced["seconds_per_1000_requests"]["median"] == pytest.approx(requests)
    for key in ("prefill_ms", "decode_ms_per_token"):
        speedup = reduced[key.replace("_ms_per_token", "_speedup").replace("_ms", "_speedup")]["median"]
        assert reduced[key]["median"] * speedup == pytest.approx(full[key]["median"])
    assert (full["method"], reduced["method"]) == ("full", "vtc-cls(keep=36)")
    assert reduced["tokens_after"] == 36
    assert reduced["flops"] < full["flops"]
    assert reduced["kv_bytes"] < full["kv_bytes"]


def test_bench_of_a_classifier_measures_the_method_of_its_training(outcomes: dict[str, Outcome]) -> None:
    full, reduced = json.loads(outcomes["bench classifier"].out)
    assert (full["method"], reduced["method"]) == ("full", "pumer(layers=(2, 4, 6))")
    assert reduced["tokens_after"] < full["tokens_after"] == 145
    assert reduced["flops"] < full["flops"]
    assert (reduced["decode_ms_per_token"], reduced["kv_bytes"]) == (None, None)
    table = outcomes["bench classifier table"]
    assert table.code == 0, table.err
    assert "pumer(layers=(2, 4))" in table.out
    assert "break-even:" not in table.out


def test_the_same_picture_in_other_pixels_is_the_same_picture(model: str, photo: Path, tmp_path: Path) -> None:
    """Ask about one picture in 8-bit grey, in 16-bit grey, and behind a transparent white: the overlays are equal."""
    grey = Image.open(photo).convert("L")
    Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257).save(tmp_path / "wide.png")
    grey.save(tmp_path / "grey.png")
    clear = Image.merge("LA", [Image.new("L", grey.size), grey.point(lambda value: 255 - value)])
    clear.save(tmp_path / "clear.png")  # black, so that only the white behind it makes it lighter
    names = ("grey", "wide", "clear")
    calls = {
        name: ["ask", tmp_path / f"{name}.png", QUESTION, "--model", model, "--overlay", tmp_path / f"kept-{name}.png"]
        for name in names
    }
    outcomes = run_many(calls)
    assert [outcomes[name].code for name in names] == [0, 0, 0]
    kept = [np.asarray(Image.open(tmp_path / f"kept-{name}.png")) for name in names]
    assert np.array_equal(kept[0], kept[1])
    assert np.array_equal(kept[0], kept[2])
    assert len({outcomes[name].out for name in names}) == 1
