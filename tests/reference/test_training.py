"""The recipe: it runs, resumes bit for bit, and refuses to continue another run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from safetensors.torch import load_file

from tokensieve import reference
from tokensieve.reference.learning import Batch
from tokensieve.reference.model import build_model, build_processor, vocabulary
from tokensieve.reference.packing import IGNORE, SLOTS, make_packs
from tokensieve.reference.vocabulary import COLUMNS, ROWS
from tokensieve.train import reference as recipe
from tokensieve.train import reference_weights as weights
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


def test_a_new_run_starts_from_earlier_weights_with_fewer_words(tmp_path: Path) -> None:
    """Known words keep their weights, new ones are new, and patches are told their places once."""
    earlier, model = reference.load()[0], weights.new_trainee(1).model
    new = model.get_input_embeddings().weight.detach().clone()
    words = earlier.get_input_embeddings().weight.detach()
    weights.copy_weights(reference.path(), model)
    embeddings = model.get_input_embeddings().weight.detach()
    assert torch.equal(embeddings[: len(words)], words)
    assert torch.equal(embeddings[len(words) :], new[len(words) :])
    pixels = torch.randn(1, 3, 120, 120)
    assert torch.equal(
        model.model.vision_tower.embeddings.patch_embedding(pixels),
        earlier.model.vision_tower.embeddings.patch_embedding(pixels),
    )
    table = model.model.vision_tower.embeddings.position_embedding.weight
    places = table.detach().clone()
    assert places[1:].square().mean().sqrt() == pytest.approx(weights.MARKS, rel=0.1)
    weights.mark_places(model)
    assert torch.equal(table, places)


def test_weights_of_another_recipe_are_refused(tmp_path: Path) -> None:
    build_model(width=64).save_pretrained(tmp_path)
    build_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no earlier model of this recipe: its weight .* does not fit"):
        weights.copy_weights(tmp_path, weights.new_trainee(0).model)
    words = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(words.replace('"anchor"', '"boat"'))
    with pytest.raises(ValueError, match="has other words than this recipe, or in another order"):
        weights.copy_weights(tmp_path, weights.new_trainee(0).model)


def test_a_point_is_right_anywhere_on_the_thing() -> None:
    packs = make_packs("validation", range(4), variants=1, turned=0.0)
    batch = Batch.of(packs, np.arange(4), np.zeros(4, np.int64))
    number = SLOTS.index("point")
    words = batch.targets.clone()
    assert recipe._right(batch, words, number, "point").all()
    asked = (batch.slots == number) & (batch.targets != IGNORE) & (batch.targets != recipe.END)
    ids = [vocabulary().index(word) for word in (*COLUMNS, *ROWS)]
    for row in range(4):
        column, line = np.flatnonzero(asked[row].numpy())
        right = 0
        for x in COLUMNS:
            for y in ROWS:
                words[row, column], words[row, line] = vocabulary().index(x), vocabulary().index(y)
                right += int(recipe._right(batch, words, number, "point")[row])
        assert right == 4
        words[row, column] = ids[-1]  # a row where a column belongs
        assert not recipe._right(batch, words, number, "point")[row]
