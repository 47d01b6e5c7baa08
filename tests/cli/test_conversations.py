"""``compare`` on questions about two images and with an earlier turn, in one data set with plain ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from tests.cli.calling import run
from tokensieve.reference.benchmark import benchmark

ROWS = benchmark("validation", scenes=2, types=("colour", "images", "turn"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    lines = []
    for row in ROWS:
        names = [f"{drawn.index}.png" for drawn in row.scenes]
        for drawn, name in zip(row.scenes, names, strict=True):
            drawn.image.save(folder / name)
        line = {"id": row.id, "images": names, "question": row.question, "answer": list(row.accepted)}
        lines.append(line | {"type": row.type, "turns": row.turns})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "data.jsonl"


def test_two_images_and_second_turns_are_compared(model: str, data: Path, tmp_path: Path) -> None:
    options = ["--keep", "16", "--seeds", "1", "--no-measure", "--max-new-tokens", "3", "--batch-size", "4", "--json"]
    outcome = run(
        "compare", "--model", model, "--data", str(data), "--methods", "trsm", *options, "--output", str(tmp_path)
    )
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    before = {line["sample"].split()[0]: line["before"] for line in lines if line.get("run") == "full"}
    after = {line["sample"].split()[0]: line["after"] for line in lines if line.get("run") == "trsm(keep=16)"}
    assert before == {row.id: 144 * len(row.scenes) for row in ROWS}
    assert after == {row.id: 16 * len(row.scenes) for row in ROWS}
    answers = {line["sample"].split()[0]: line["text"] for line in lines if line.get("run") == "full"}
    for row in ROWS:
        # colours, in a plain question as in a second turn, are what the bundled weights know best
        assert row.type == "images" or model != "reference" or answers[row.id] == row.answer
