"""Results and environment: read back as written, never half written, naming no machine."""

import json
import platform
import resource
from pathlib import Path

import pytest

from tokensieve.evaluate import Example, OutputError, Results, Row, TypeScore, environment

ROW = Row("pool", 9, 144.0, 9.0, 9.0, 2, 0.5, 0.1, 0.9, None, None, None, None, None, None, None)
RESULTS = Results(
    complete=True,
    environment={"torch": "2"},
    settings={"model": "m"},
    rows=(ROW,),
    types=((TypeScore("colour", 2, 0.5, 0.1, 0.9),),),
    differences=((0.0, -0.1, 0.1),),
    examples=(Example("1", "examples/0.png", "what?", ("cup", "mug"), ({"method": "pool", "keep": 9},)),),
)


def test_round_trip(tmp_path):
    RESULTS.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == RESULTS
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


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


@pytest.mark.parametrize("content", ["[]", "{}", "no json", '{"version": 1}'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json is not a results file"):
        Results.load(tmp_path / "x.json")


def test_another_version_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"version": 0}')
    with pytest.raises(ValueError, match="another version"):
        Results.load(tmp_path / "x.json")


def test_environment(model):
    found = environment(model)
    assert found["dtype"] == "float32"
    assert found["attention"] == "sdpa"
    assert found["device"] == "cpu"
    assert {"tokensieve", "python", "torch", "transformers", "cpu", "threads", "date"} <= found.keys()
    told = json.dumps(found)
    assert platform.node() not in told
    assert str(Path.cwd()) not in told
