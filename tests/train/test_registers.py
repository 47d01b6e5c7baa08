"""Registers are trained by the answers' loss beside a model that stays as it is."""

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
SPEC, FEW = "victor(layer=1, keep=8)", "reference:train[:26]"


def test_only_the_registers_that_take_part_move(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SCORED", 2)
    models = []
    original = answers.MethodTrainer.__init__

    def init(self, recipe, sieve, **options):
        models.append((sieve.model, {name: rows.clone() for name, rows in sieve.model.state_dict().items()}))
        original(self, recipe, sieve, **options)

    monkeypatch.setattr(answers.MethodTrainer, "__init__", init)
    train_method(SPEC, "reference", FEW, tmp_path, recipe=Recipe(epochs=1, batch_size=9, rate=1e-2, warmup=0.0))
    ((model, before),) = models
    assert all(torch.equal(rows, before[name]) for name, rows in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    assert all(weight.grad is None for weight in model.parameters())
    (rows,) = load_file(tmp_path / "net.safetensors").values()
    with tokensieve.attach(model, SPEC, weights="random") as sieve:
        fresh = sieve.nets["decoder"].rows
    assert not torch.isclose(rows[0], fresh[0]).any(), "the first register takes part in each step"
    assert torch.equal(rows[8:], fresh[8:])
    with tokensieve.attach(model, SPEC, weights=str(tmp_path)) as sieve:
        assert torch.equal(sieve.nets["decoder"].rows, rows)


@torch.no_grad()
def test_questions_that_share_an_image_share_its_registers(monkeypatch):
    """The beginning of the prompts runs once, and each question continues it: the logits are those of whole prompts."""
    model, processor = load()
    batch = Collator(processor, "{question}")(read_samples(FEW)[0][:5])
    stages = tokensieve.parse(SPEC, weights="random")
    together = answer_logits(model, batch, stages, processor)
    monkeypatch.setattr(SharedPrompts, "of", lambda *_: None)
    assert torch.allclose(together, answer_logits(model, batch, stages, processor), atol=1e-4)
