"""The two halves of 2409.01162: patches up to the knee before the LLM, then what the words attend to inside it."""

import pytest
import torch

import tokensieve
from tests.support import models, prompts
from tokensieve.ops import knee


def test_knee():
    assert knee(torch.tensor([10.0, 9.0, 8.0, 1.0, 0.5, 0.2, 0.0])).item() == 4  # where the steep part ends
    assert knee(torch.tensor([[5.0, 1.0, 1.0, 1.0], [4.0, 4.0, 4.0, 0.0]])).tolist() == [2, 3]
    assert knee(torch.tensor([[1.0]])).tolist() == [1]


def test_both_halves():
    family, model = "llava-clip-deep", models.tiny_model("llava-clip-deep")
    samples = prompts.batch(family, "ragged")
    with tokensieve.attach(model, "cls-knee + text-correlation(layer=2, keep=0.5)") as sieve, torch.no_grad():
        model(**prompts.collate(family, samples))
    states = model.model.vision_tower(torch.cat([s.images[0].pixels for s in samples])).last_hidden_state
    cosines = torch.cosine_similarity(states[:, :1], states[:, 1:], dim=-1)
    for row, (decision,), (blocks,) in zip(cosines, sieve.last, sieve.tokens, strict=True):
        count = int(knee(row))
        nearest = set(row.argsort(descending=True)[:count].tolist())
        assert blocks[0] == count
        assert blocks[-1] == decision.slots == max(1, round(count / 2))
        assert set(decision.kept.tolist()) <= nearest


def test_an_encoder_without_cls():
    with pytest.raises(ValueError, match="this encoder has none"):
        tokensieve.attach(models.tiny_model("qwen2.5-vl-deep"), "cls-knee")
    tokensieve.attach(models.tiny_model("qwen2.5-vl-deep"), "fastv").detach()
