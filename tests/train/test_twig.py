"""A twig learns to answer from the states that enter a layer of a model that stays as it is."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tokensieve
from tokensieve import Refusal
from tokensieve.engine.nets import load_net, shape_of
from tokensieve.reference import load
from tokensieve.train.adapter.data import Collator, read_samples
from tokensieve.train.adapter.loss import answer_logits
from tokensieve.train.method import Recipe, run, train_method, twig

pytest.importorskip("accelerate")
FEW = "reference:train[:26]"


@pytest.fixture
def watched(monkeypatch):
    """Measure few questions; record the trainers that are made, and what their models hold before."""
    monkeypatch.setattr(run, "SCORED", 2)
    made, original = [], twig.TwigTrainer.__init__

    def init(self, recipe, vlm, **options):
        original(self, recipe, vlm, **options)
        weights = [{name: rows.clone() for name, rows in part.state_dict().items()} for part in (vlm, self.model)]
        made.append((self, *weights))

    monkeypatch.setattr(twig.TwigTrainer, "__init__", init)
    return made


@pytest.mark.parametrize("method", ["twigvlm", "divprune(keep=0.3) + twigvlm(blocks=2)"])
def test_only_the_twig_moves(tmp_path, watched, method):
    recipe = Recipe.of("twig", epochs=1, batch_size=9, rate=1e-3, distillation=1.0 if "+" in method else None)
    about = train_method(method, "reference", FEW, tmp_path, recipe=recipe)
    ((trainer, before, untrained),) = watched
    after, trained = trainer.vlm.state_dict(), trainer.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(rows, after[name]) for name, rows in before.items())
    assert all(weight.grad is None for weight in trainer.vlm.parameters())
    still = [name for name, rows in untrained.items() if torch.equal(rows, trained[name])]
    assert not still, "every weight of blocks, norm and head is trained"
    stored = load_file(tmp_path / "net.safetensors")
    assert stored.keys() == {name.removeprefix("blocks.") for name in trained if name.startswith("blocks.")}
    assert all(torch.equal(rows, trained[f"blocks.{name}"]) for name, rows in stored.items())
    assert 0 <= about["metrics"]["twig_right"] <= 1
    assert json.loads((tmp_path / "method.json").read_text())["net"] == {
        "layer": 1,
        "blocks": 2 if "+" in method else 1,
    }
    assert not trainer.vlm.model.language_model.layers[1]._forward_pre_hooks
    with tokensieve.attach(trainer.vlm, method.rpartition("+ ")[2], weights=str(tmp_path)) as sieve:
        assert all(torch.equal(rows, sieve.nets["decoder"].state_dict()[name]) for name, rows in stored.items())
    if "+" in method:
        with pytest.raises(Refusal, match="these weights are a twig of 2 blocks from layer 1 on"):
            tokensieve.attach(trainer.vlm, "twigvlm", weights=str(tmp_path))


@torch.no_grad()
def test_copies_of_all_later_layers_answer_as_the_model_does():
    """The twig that copies every layer from its own on has the logits of the whole model, padding among the columns."""
    model, processor = load()
    (method,) = tokensieve.parse("twigvlm", weights="random", layers=(1, 3), blocks=3)
    whole = twig.Twig(load_net(method, shape_of(model), model.get_decoder()), model)
    batch = Collator(processor, "{question}")(read_samples(FEW)[0][:5])
    with tokensieve.attach(model, "full"):
        hidden, arguments, teacher = twig.states(model, 1, batch, whole=True)
        again, _, none = twig.states(model, 1, batch)
        right = twig.answered(model, whole, batch).tolist()
    logits = whole(hidden, arguments, batch["labels"].shape[1] + 1)
    assert len({int(row.sum()) for row in batch["attention_mask"]}) > 1
    assert torch.allclose(logits, teacher, atol=1e-4)
    assert torch.allclose(teacher, answer_logits(model, batch, tokensieve.parse("full"), processor), atol=1e-4)
    assert none is None
    assert torch.equal(again, hidden)
    words = zip(teacher.argmax(-1), batch["labels"], strict=True)
    assert right == [bool(((row == label) | (label < 0)).all()) for row, label in words]
    assert any(right)
