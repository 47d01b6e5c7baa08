"""Nets that make rows are trained as all others are."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import tokensieve
from tokensieve import Refusal, parse
from tokensieve.engine.nets import load_net, shape_of
from tokensieve.engine.prefusion import Prefusion
from tokensieve.loading import load_model
from tokensieve.train.method import Recipe, run, train_method

SPECS = ("mqt(keep=6)", "vistog(keep=6)", "tokenpacker(levels=(0, 1))", "setok(threshold=9.0, fallback=3)")


@pytest.mark.parametrize("spec", SPECS)
def test_every_weight_is_trained_and_read_back(spec, llava, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SCORED", 2)
    data = str(llava.parent / "train.jsonl")
    recipe = Recipe(epochs=1, batch_size=6, rate=1e-2, warmup=0.0)
    about = train_method(spec, str(llava), data, tmp_path, recipe=recipe)
    assert about["metrics"]["step"] >= 1
    model, processor = load_model(str(llava))
    (method,) = parse(spec, weights="random")
    fresh, trained = load_net(method, shape_of(model)), load_file(tmp_path / "net.safetensors")
    still = [name for name, rows in fresh.named_parameters() if torch.equal(rows, trained[name])]
    assert not still
    stored = json.loads((tmp_path / "method.json").read_text())["model"]
    assert stored["patch_width"] == stored["tower_width"] == model.config.vision_config.hidden_size
    wider = dataclasses.replace(shape_of(model), patch_width=48)
    with pytest.raises(Refusal, match="fit a vision encoder of width 16, and 16 before the projector; this one has 16"):
        load_net(dataclasses.replace(method, weights=str(tmp_path)), wider)
    with tokensieve.attach(model, spec, weights=str(tmp_path), processor=processor) as sieve:
        parts = sieve.nets["connector"].state_dict()
        assert all(torch.equal(parts[name], rows) for name, rows in trained.items())


def test_llava_mini_learns_with_the_answer_unchanged(llava, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SCORED", 2)
    passed, fused = [], Prefusion.fused

    def recording(self, prefill, entering):
        changed = fused(self, prefill, entering)
        if prefill.kwargs.get("labels") is not None:
            labelled = prefill.kwargs["labels"] >= 0
            passed.append((bool(labelled.any()), torch.equal(changed[labelled], entering[labelled])))
        return changed

    monkeypatch.setattr(Prefusion, "fused", recording)
    recipe = Recipe(epochs=1, batch_size=6, rate=1e-2, warmup=0.0)
    spec = "llava-mini(blocks=2)"
    about = train_method(spec, str(llava), str(llava.parent / "train.jsonl"), tmp_path, recipe=recipe)
    assert passed == [(True, True)] * about["metrics"]["step"]
    model, _ = load_model(str(llava))
    (method,) = parse(spec, weights="random")
    trained = load_file(tmp_path / "net.safetensors")
    fresh = load_net(method, shape_of(model), model.get_decoder())
    assert not [name for name, rows in fresh.named_parameters() if torch.equal(rows, trained[name])]
    with tokensieve.attach(model, "llava-mini", weights=str(tmp_path)) as sieve:
        assert all(torch.equal(sieve.nets["connector"].state_dict()[name], rows) for name, rows in trained.items())
