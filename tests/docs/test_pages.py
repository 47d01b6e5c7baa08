"""The pages in ``docs`` are what their generators write, and the generators say what is true."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tokensieve import list_methods
from tokensieve.evaluate import VsRandom
from tokensieve.methods.registry import find
from tokensieve.reproduce.published import PUBLISHED

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))
import make_concepts  # noqa: E402
import make_engines  # noqa: E402
import make_methods  # noqa: E402
import make_results  # noqa: E402

ENTRY = make_results.Entry("kept", "trsm", 0.5, 72.0, 72.0, 10, 0.5, 0.4, 0.6, None)
LOST, TIED, WON = (VsRandom(72.0, 0.5, gap, gap - 0.05, gap + 0.05) for gap in (-0.1, 0.0, 0.1))


def test_the_methods_pages_are_what_the_generator_writes():
    written = {path.name: path.read_text("utf-8") for path in (ROOT / "docs" / "methods").iterdir()}
    made = make_methods.pages()
    assert set(written) == set(made) == {"README.md", *(f"{info.name}.md" for info in list_methods())}
    assert [name for name in made if written[name] != made[name]] == [], "run python docs/make_methods.py"


def test_the_results_page_is_what_the_generator_writes():
    text = (ROOT / "docs" / "results.md").read_text("utf-8")
    assert make_results.page(text, make_results.ledger()) == text, "run python docs/make_results.py"


def test_the_engines_page_is_what_the_generator_writes():
    text = (ROOT / "docs" / "engines.md").read_text("utf-8")
    assert make_engines.page(text) == text, "run python docs/make_engines.py"


def test_the_pictures_of_the_concepts_are_what_the_script_makes():
    for name, picture in (("stages.svg", make_concepts.stages()), ("positions.svg", make_concepts.positions())):
        assert (make_concepts.FOLDER / name).read_text("utf-8") == picture, "run python docs/make_concepts.py"


@pytest.mark.parametrize("name", [info.name for info in list_methods()])
def test_a_docstring_says_what_a_page_needs(name):
    method = find(name)
    said = make_methods.Docstring.of(method)
    assert said.text
    undocumented = [field.name for field in fields(method) if not make_methods.meaning_of(field.name, said)]
    assert undocumented == []
    assert said.arguments.keys() <= {field.name for field in fields(method)}
    assert "Cost" in said.remarks, "say under Cost: what time and extra memory grow with"
    assert "Paper" in said.remarks or method.info.paper == "baseline"


def test_published_rows_are_whole_and_have_a_method():
    named = set()
    for table in json.loads(PUBLISHED.read_text("utf-8"))["tables"]:
        assert all(len(row) == 2 + len(table["columns"]) for row in table["rows"])
        assert table["full"] is None or len(table["full"]) == len(table["columns"])
        named |= {name for row in table["rows"] for name in make_methods._names(row[0])}
        if table["columns"][-1] == "mean of 8":  # cells and mean are rounded to 0.1; a wrong digit would show
            for *cells, mean in (table["full"], *(row[2:] for row in table["rows"])):
                assert abs(sum(cells) / 8 - mean) <= 0.1, cells
    assert named <= {info.name for info in list_methods()}


def test_the_source_papers_results_are_on_their_pages():
    pages = make_methods.pages()
    table = """
        | 576 (all) | 70.2 | 62.0 | 58.3 | 85.9 | 64.7 | 58.1 | 31.1 | 66.2 | 62.1 |
        | 256 | 69.6 | 60.3 | 57.7 | 86.2 | 63.6 | 57.1 | 34.4 | 64.8 | 61.7 |
        | 128 | 69.7 | 58.2 | 56.8 | 84.0 | 62.5 | 56.8 | 33.4 | 62.2 | 60.5 |
        | 64 | 70.0 | 55.7 | 55.5 | 78.8 | 61.2 | 55.8 | 31.7 | 58.3 | 58.4 |
        | 576 (all) | 3018 | 1921 |
        | 128 | 2049 | 1349 |
        | 64 | 1750 | 1216 |
    """
    assert [row for row in table.split("\n") if row.strip() not in pages["vtc-cls.md"]] == []
    assert 'compressed "by 20 %" at comparable accuracy' in pages["trsm.md"]
    assert "up to 2× inference throughput, over 50 % less memory, less than 1 % of accuracy lost" in pages["pumer.md"]


def test_a_docstring_in_parts():
    class Thing:
        """One line
        of two.

        More.

        Args:
            first, second: a number: with a colon
                and a second line.
            third: ``None``.

        Cost: O(N).
        Paper: "Title",
            2024.
        """

    said = make_methods.Docstring.of(Thing)
    assert said.text == ("One line of two.", "More.")
    number = "a number: with a colon and a second line."
    assert said.arguments == {"first": number, "second": number, "third": "``None``."}
    assert said.remarks == {"Cost": "O(N).", "Paper": '"Title", 2024.'}


def test_losses_and_ties_are_told_by_the_paired_interval():
    entries = [
        replace(ENTRY, method="random"),
        replace(ENTRY, method="worse", chance=LOST),
        replace(ENTRY, method="tied", chance=TIED),
        replace(ENTRY, method="better", chance=WON),
        replace(ENTRY, method="worse", keep=0.11, chance=LOST),
        replace(ENTRY, method="random", keep=0.11),
        replace(ENTRY, method="own", keep=None, tokens_average=80.0, chance=LOST),
        replace(ENTRY, method="few", keep=None, tokens_after=1.0, tokens_average=1.0),
    ]
    assert list(make_results.against_random(entries)) == [
        "- At 50%, `worse` is below `random`; `tied` not told apart from it.",
        "- At 11%, `worse` is below `random`.",
        "- At a number of tokens of their own, `own` is below `random`; `few` not compared.",
    ]
    table = list(make_results.by_budget(entries))
    assert table[0] == "| method | 50% | 11% |"
    assert table[3:5] == [
        "| `worse` | 50.0 (40.0–60.0) ↓ | 50.0 (40.0–60.0) ↓ |",
        "| `tied` | 50.0 (40.0–60.0) ≈ |  |",
    ]
    assert table[2] == "| `random` | 50.0 (40.0–60.0) | 50.0 (40.0–60.0) |"
    assert table[5:] == [
        "| `better` | 50.0 (40.0–60.0) ↑ |  |",
        "| `own` | 50.0 (40.0–60.0) ↓, 72 kept, 80 on average |  |",
        "| `few` | 50.0 (40.0–60.0), 1 kept |  |",
    ]


def test_new_rows_replace_those_of_the_same_method_and_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(make_results, "LEDGER", tmp_path / "ledger.jsonl")
    from tests.report.report_rows import results, row

    def told(*rows):
        found = results(list(rows))
        return replace(found, settings={**found.settings, "keep_means": "final"})

    make_results.enter(told(row("full", None, 0.9), row("trsm", 36, 0.5), row("random", 36, 0.4)))
    make_results.enter(told(row("full", None, 0.9), row("trsm", 36, 0.6), row("trsm", 16, 0.3)))
    found = make_results.ledger()
    assert [(entry.method, entry.keep, entry.accuracy) for entry in found] == [
        ("full", None, 0.9), ("trsm", 36, 0.6), ("random", 36, 0.4), ("trsm", 16, 0.3)
    ]  # fmt: skip
    assert found[1].chance is None, "the second run had no random"
