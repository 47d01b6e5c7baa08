"""The recipe: it runs, resumes bit for bit, and refuses to continue another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from safetensors.torch import load_file

from tokensieve.train import reference as recipe
from tokensieve.train.reference import Stage, train_reference

STAGES = (Stage("tower", 1, 4, 1e-3, seeing=1.0), Stage("reader", 2, 4, 1e-3), Stage("joint", 2, 4, 1e-3, seeing=0.2))
SETTINGS = {"scenes": 8, "stages": STAGES, "processes": 1, "report_every": 1, "progress": False, "card": False}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "VALIDATION_SCENES", 64)


def test_interrupted_run_ends_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_reference(tmp_path / "whole", **SETTINGS)
    advance, steps = recipe._Run.advance, iter(range(10))

    def fail_at_fourth_step(run: recipe._Run) -> None:
        if next(steps) == 3:
            raise KeyboardInterrupt
        advance(run)

    monkeypatch.setattr(recipe._Run, "advance", fail_at_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        train_reference(tmp_path / "parts", **SETTINGS)
    monkeypatch.setattr(recipe._Run, "advance", advance)
    parts = train_reference(tmp_path / "parts", **SETTINGS)
    one, two = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("tower", 1), ("reader", 1), ("reader", 2), ("joint", 1), ("joint", 2)
    ]  # fmt: skip


def test_other_settings_do_not_continue_a_run(tmp_path: Path) -> None:
    settings = SETTINGS | {"stages": STAGES[:1]}
    train_reference(tmp_path, **settings)
    with pytest.raises(ValueError, match=r"holds a run with .*'seed': 0.* or start anew with resume=False"):
        train_reference(tmp_path, **settings, seed=1)
    train_reference(tmp_path, **settings, seed=1, resume=False)
