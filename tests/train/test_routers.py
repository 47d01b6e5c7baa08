"""Routers are trained by the answers' loss beside a model that stays as it is."""

import pytest
import torch
from safetensors.torch import load_file

import tokensieve
from tokensieve.reference import load
from tokensieve.train.adapter.data import Collator, read_samples
from tokensieve.train.adapter.loss import answer_logits
from tokensieve.train.adapter.shared import SharedPrompts
from tokensieve.train.method import Recipe, answers, run, train_method

pytest.importorskip("accelerate")
FEW = "reference:train[:20]"


@pytest.mark.parametrize("spec", ["p-mod", "videollm-mod(keep=0.5)"])
def test_only_the_routers_move(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SCORED", 2)
    models = []
    original = answers.MethodTrainer.__init__

    def init(self, recipe, sieve, **options):
        models.append((sieve.model, {name: rows.clone() for name, rows in sieve.model.state_dict().items()}))
        original(self, recipe, sieve, **options)

    monkeypatch.setattr(answers.MethodTrainer, "__init__", init)
    train_method(spec, "reference", FEW, tmp_path, recipe=Recipe(epochs=1, batch_size=9, rate=1e-2, warmup=0.0))
    ((model, before),) = models
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(rows, before[name]) for name, rows in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    trained = load_file(tmp_path / "net.safetensors")
    moved = {name for name, rows in trained.items() if rows.any()}
    # what the last layer adds to visual tokens reaches no answer; videollm-mod has routers in layers 1 and 3 of 4
    layers = (1, 2) if spec == "p-mod" else (1,)
    assert moved == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    with tokensieve.attach(model, spec, weights=str(tmp_path)) as sieve:
        assert torch.equal(sieve.nets["decoder"]["1"].weight, trained["1.weight"])


@torch.no_grad()
def test_questions_that_share_an_image_share_its_routes(monkeypatch):
    """The beginning of the prompts runs once, and each question continues it: the logits are those of whole prompts."""
    model, processor = load()
    batch = Collator(processor, "{question}")(read_samples(FEW)[0][:4])
    stages = tokensieve.parse("p-mod(weights='random')")
    together = answer_logits(model, batch, stages, processor)
    monkeypatch.setattr(SharedPrompts, "of", lambda *_: None)
    assert torch.allclose(together, answer_logits(model, batch, stages, processor), atol=1e-4)
