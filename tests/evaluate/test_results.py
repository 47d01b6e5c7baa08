"""Results and environment: read back as written, never partly written, without a machine's name."""

import csv
import json
import platform
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from tokensieve import Refusal, parse
from tokensieve.errors import MissingExtra
from tokensieve.evaluate import (
    METRICS,
    Example,
    OutputError,
    Question,
    Results,
    Row,
    Sample,
    Skipped,
    TypeScore,
    VsRandom,
    environment,
)
from tokensieve.evaluate.journal import Answer
from tokensieve.evaluate.plan import Entry, Run
from tokensieve.evaluate.table import Table, clusters

ROW = Row(
    "pool", 9, 144.0, 9.0, 9.0, 2, 0.5, 0.1, 0.9, None, None, None, None, None, None, None,
    types=(TypeScore("colour", 2, 0.5, 0.1, 0.9, 0.0, -0.1, 0.1),),
    random=VsRandom(9.0, 0.6, -0.1, -0.2, 0.0),
)  # fmt: skip
RESULTS = Results(
    complete=True,
    environment={"torch": "2"},
    settings={"model": "m"},
    rows=(ROW,),
    questions=(Question("1", "colour", 0), Question("2", "colour", 0)),
    scores=(((1.0, 0.0),),),
    skipped=(Skipped("3", "data.jsonl, line 3", "no such image file"),),
    examples=(Example("1", "examples/0.png", "what?", ("cup", "mug"), ({"method": "pool", "keep": 9},)),),
)


def test_round_trip(tmp_path):
    RESULTS.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == RESULTS
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_row_is_compared_with_random_of_a_similar_number_of_tokens():
    samples = [Sample(str(i), Path(f"{i}.png"), "what?", ("a",)) for i in range(40)]
    table = Table(samples, METRICS["exact"], ())

    def add(spec, tokens, *right):
        """Add a row with one run per number of right answers; the first questions are right."""
        runs = [
            {s.id: Answer(s.id, "a" if i < n else "b", 144, tokens, tokens) for i, s in enumerate(samples)}
            for n in right
        ]
        table.add(Entry(spec, None, tuple(Run(spec, tuple(parse(spec))) for _ in right)), runs)

    add("full", 144, 40)
    for tokens in (30, 72):
        add(f"random(keep={tokens})", tokens, 20, 24)
    add("pool", 33, 4)
    add("uniform", 80, 38)
    add("trsm", 29, 22)
    add("prumerge", 50, 1)
    chances = [row.random for row in table.results(complete=True, environment={}, settings={}).rows]
    assert chances[:3] == [None, None, None]
    assert [chance and chance.tokens for chance in chances[3:]] == [30, 72, 30, None]
    below, above, same, _ = chances[3:]
    assert (below.lost, below.won) == (True, False)
    assert (above.lost, above.won) == (False, True)
    assert (same.lost, same.won) == (False, False)
    assert (below.difference, below.accuracy) == pytest.approx((-0.45, 0.55))
    assert below.low < below.difference < below.high < -0.2, "paired: where both are wrong nothing varies"


def test_a_full_disk_keeps_the_older_file(tmp_path):
    path = tmp_path / "results.json"
    RESULTS.save(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*results\.json: .*; the predictions are kept"):
            RESULTS.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["[]", "{}", "no json", "\udcff", '{"rows": []}'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content, "utf-8", "surrogateescape")  # one of them is not UTF-8
    with pytest.raises(Refusal, match=r"x\.json is not a results file"):
        Results.load(tmp_path / "x.json")


def test_another_version_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"version": 2, "rows": []}')
    with pytest.raises(Refusal, match="another version of Tokensieve: its format is 2, and 3 is read"):
        Results.load(tmp_path / "x.json")


def test_environment(model):
    found = environment(model)
    assert found["dtype"] == "float32"
    assert found["attention"] == "sdpa"
    assert found["device"] == "cpu"
    assert {"tokensieve", "python", "torch", "transformers", "cpu", "threads", "date"} <= found.keys()
    text = json.dumps(found)
    assert platform.node() not in text
    assert str(Path.cwd()) not in text


def yes_no_results():
    """Two rows of the metric yes_no, the second with two seeds: eight questions about four images, two types."""
    expected = ["yes", "yes", "no", "no", "yes", "yes", "no", "no"]
    samples = [Sample(str(i), Path(f"{i // 2}.png"), "is it?", (e,), "ab"[i % 2]) for i, e in enumerate(expected)]
    table = Table(samples, METRICS["yes_no"], ())
    runs = {"full": ["YYNNYYNN"], "random": ["YYYNYNNN", "NNNNNNNN"]}
    for method, texts in runs.items():
        answers = [
            {s.id: Answer(s.id, {"Y": "Yes", "N": "No"}[c], 144, 9, 9) for s, c in zip(samples, text, strict=True)}
            for text in texts
        ]
        table.add(Entry(method, None, tuple(Run(method, tuple(parse(method))) for _ in texts)), answers)
    return table.results(complete=True, environment={}, settings={"metric": "yes_no"})


def test_f1_of_yes_no_questions_follows_from_the_confusion_matrix():
    results = yes_no_results()
    full, random = (row.yes_no for row in results.rows)
    assert (full.f1, full.precision, full.recall, full.yes_ratio) == (1, 1, 1, 0.5)
    assert full.f1_low < 0.8, "eight right answers do not make it certain"
    # over both seeds: true positives 3 + 0, false positives 1 + 0, false negatives 1 + 4
    assert (random.precision, random.recall, random.yes_ratio) == (3 / 4, 3 / 8, 4 / 16)
    assert random.f1 == pytest.approx(2 * 3 / (2 * 3 + 1 + 5))
    assert random.f1_low < random.f1 < random.f1_high
    assert results.yes_no(results.rows[1]) == random
    # type a is every second question: true positives 2, false positives 1, false negatives 2 over both seeds
    assert results.yes_no(results.rows[1], "a").f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert results.rows[1].to_json()["yes_no"]["f1"] == random.f1


def test_f1_is_for_yes_no_questions_only():
    with pytest.raises(Refusal, match="F1 is for the metric yes_no; this comparison has exact"):
        replace(RESULTS, settings={"metric": "exact"}).yes_no(ROW)


def test_questions_that_share_an_image_share_a_number():
    images = [("a",), ("b",), ("a",), ("c", "d"), ("e",), ("d",), ("e", "c")]
    pictures = [tuple(Path(name) for name in names) for names in images]
    samples = [Sample(str(i), p if len(p) > 1 else p[0], "?", ("x",)) for i, p in enumerate(pictures)]
    assert clusters(samples).tolist() == [0, 1, 0, 2, 2, 2, 2]


def test_paired_compares_any_two_rows_in_all_questions_or_one_type():
    results = yes_no_results()
    full, random = results.rows
    assert results.paired(full, random).difference == pytest.approx(1 - (6 + 4) / 16)
    assert results.paired(full, random, type="a").samples == 4
    assert results.paired(full, random).difference == -results.paired(random, full).difference
    assert results.paired(full, random).clusters == 4
    assert random.difference == results.paired(random, full).difference
    with pytest.raises(Refusal, match="no question of type 'c'; the types are 'a', 'b'"):
        results.paired(full, random, type="c")
    with pytest.raises(Refusal, match="pool at 9 is not a row of these results"):
        results.paired(ROW, full)


def test_rows_are_found_by_method_and_budget():
    results = replace(RESULTS, rows=(ROW, replace(ROW, keep=0.25)))
    assert results.row("pool") is ROW
    assert results.row("pool", 0.25).keep == 0.25
    with pytest.raises(Refusal, match=r"no row 'pool at 50%'; the rows are pool at 9, pool at 25%"):
        results.row("pool", 0.5)


def test_tables_are_flat_with_equal_keys(tmp_path):
    results = yes_no_results()
    rows = results.records()
    assert rows[0].keys() == rows[1].keys()
    assert list(rows[0])[:3] == ["method", "keep", "tokens_before"]
    assert rows[1]["yes_no_f1"] == results.rows[1].yes_no.f1
    assert "random_tokens" not in rows[0], "no row was compared with random"
    assert [(r["method"], r["type"], r["samples"]) for r in results.records("types")] == [
        ("full", "a", 4), ("full", "b", 4), ("random", "a", 4), ("random", "b", 4)
    ]  # fmt: skip
    questions = results.records("questions")
    assert len(questions) == 8 * 3
    assert questions[-1] == {
        "method": "random", "keep": None, "seed": 1, "id": "7", "type": "b", "image": 3, "score": 1.0
    }  # fmt: skip
    for table in ("rows", "types", "questions"):
        results.to_csv(str(tmp_path / "table.csv"), table)
        with (tmp_path / "table.csv").open(newline="") as file:
            read = list(csv.DictReader(file))
        expected = [{k: "" if v is None else str(v) for k, v in r.items()} for r in results.records(table)]
        assert read == expected
    with pytest.raises(Refusal, match="the tables are rows, types, questions; got 'words'"):
        results.records("words")
    with pytest.raises(OutputError, match=r"cannot write .*no/table\.csv: No such file"):
        results.to_csv(tmp_path / "no" / "table.csv")


def test_a_pandas_table(monkeypatch):
    results = yes_no_results()
    frame = results.to_pandas("questions")
    assert frame.groupby("method").score.mean().to_dict() == {"full": 1.0, "random": 10 / 16}
    assert list(results.to_pandas().accuracy) == [row.accuracy for row in results.rows]
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r'to_pandas\(\) needs pandas: in the checkout, pip install -e "\.\[data\]"'):
        results.to_pandas()


def test_a_plot_shows_accuracy_against_a_field(monkeypatch):
    results = yes_no_results()
    (axes,) = results.plot().axes
    lines = [(container.get_label(), container[0].get_ydata().tolist()) for container in axes.containers]
    assert lines == [("full", [100.0]), ("random", [62.5])]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens_average", "accuracy, %")
    for field in ("flops_ratio", "tokens", "method"):
        with pytest.raises(Refusal, match=f"no row has a number '{field}'"):
            results.plot(field)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(
        MissingExtra, match=r'plot\(\) needs matplotlib: in the checkout, pip install -e "\.\[report\]"'
    ):
        results.plot()


def test_representations_are_for_people():
    results = yes_no_results()
    full, random = map(repr, results.rows)
    assert re.fullmatch(r"Row\(full: accuracy 100\.0 \([\d.]+ to 100\.0\) %, 9 of 144 tokens, 8 questions\)", full)
    assert re.search(r"random: accuracy 62\.5 \(.*\) %, -37\.5 \(-[\d.]+ to [+-][\d.]+\) to full, 9 of 144", random)
    assert repr(results) == f"Results(2 rows, 8 questions, 4 images):\n  {full}\n  {random}"
    assert repr(replace(results, complete=False)).startswith("Results(2 rows, 8 questions, 4 images, not complete):")
    paired = results.paired(*results.rows)
    assert repr(paired) == f"PairedDifference({paired} points, 8 questions, 4 images)"
    assert repr(ROW).startswith("Row(pool at 9: accuracy 50.0 (10.0 to 90.0) %, 9 of 144 tokens")


def test_files_may_be_given_as_text(tmp_path):
    RESULTS.save(str(tmp_path / "results.json"))
    assert Results.load(str(tmp_path / "results.json")) == RESULTS


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(Refusal, match=r"results\.json cannot be read \(No such file or directory\)"):
        Results.load(tmp_path / "results.json")


def test_a_bug_while_loading_keeps_its_type(tmp_path, monkeypatch):
    RESULTS.save(tmp_path / "results.json")
    monkeypatch.setattr(Example, "__init__", lambda *_: None)  # takes no keywords: a fault of the program
    with pytest.raises(TypeError):
        Results.load(tmp_path / "results.json")


def test_the_example_on_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text("utf-8")
    (code,) = re.findall(r"## From Python\n.*?```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "comparing.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Results(5 rows, 40 questions" in printed
    assert re.search(r"^[+-][\d.]+ \([+-][\d.]+ to [+-][\d.]+\)$", printed, re.M)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "rows.csv", "accuracy.png"}


def test_the_choices_of_the_data_reach_the_metric():
    sample = Sample("1", Path("1.png"), "which?", ("a cup",), choices=("a star", "a cup"))
    example = Example("1", "examples/0.png", "which?", ("a cup",), ())
    for metric, accuracy, answers in (("choice", 1, ("a cup", "B")), ("exact", 0, ("a cup",))):
        table = Table([sample], METRICS[metric], [example])
        table.add(Entry("full", None, (Run("full", ()),)), [{"1": Answer("1", "Answer: B", 144, 9, 9)}])
        assert table.rows[0].accuracy == accuracy
        assert table.examples[0].answers == answers
