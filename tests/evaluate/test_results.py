"""Results and environment: read back as written, never partly written, without a machine's name."""

import json
import platform
import resource
from pathlib import Path

import pytest

from tokensieve import Refusal, parse
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
from tokensieve.evaluate.table import Table

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
        table.add(Entry(spec, None, tuple(Run(spec, tuple(parse(spec))) for _ in right)), runs, None)

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
