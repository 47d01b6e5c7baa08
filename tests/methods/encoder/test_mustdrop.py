"""MustDrop's stages together: the tokens that [CLS] ranks best are still there when the words have chosen."""

import math

import pytest
import torch

import tokensieve
from tests.methods.encoder.rules import FAMILIES, RULES
from tests.support import encoder_oracle, models, prompts
from tests.support.oracle import NOISE
from tokensieve import parse
from tokensieve.tokens import DecoderTokens, DecoderUserText

NOBODY = "together=1000.0, single=1000.0"  # thresholds that no token reaches
LLM = "mustdrop-llm(layers=(1, 2), together=0.7, single=1.5)"


@pytest.mark.parametrize("first", ["", "tome(keep=5) + ", "mustdrop-encoder(threshold=-1.0) + "])
@pytest.mark.parametrize("share", [0.08, 0.5])
def test_the_protected_are_those_that_cls_ranks_best(first, share, deviation):
    family, samples = "llava-clip", prompts.batch("llava-clip", "mixed")
    spec = f"{first}mustdrop-keys + mustdrop-llm(layers=(1, 2), {NOBODY}, protect={share})"
    model, tower = models.tiny_model(family), models.unhooked(family).model.vision_tower
    with tokensieve.attach(model, spec) as sieve, torch.no_grad():
        logits = model(**prompts.collate(family, samples)).logits
        decisions = sieve.last
        for i, s in enumerate(samples):
            if s.images:
                own = model(**prompts.collate(family, [s])).logits
                assert deviation("of a batch row from its own run (law 3)", own[0, -1], logits[i, -1]) <= NOISE
    rule = RULES.get(first.removesuffix(" + "), encoder_oracle.Rule(None, []))
    for s, row in zip(samples, decisions, strict=True):
        for shown, decision in zip(s.images, row, strict=True):
            with torch.no_grad():
                hand = encoder_oracle.run(tower, shown.pixels, rule)
            scores = hand.attention[-1].mean(0)[0, 1:]  # the last layer is behind every stage
            best = sorted(range(len(scores)), key=lambda t: -float(scores[t]))[: math.ceil(share * len(scores))]
            protected = {hand.places[t] for t in best}
            kept = set(decision.kept.tolist())
            assert protected <= kept
            assert len(kept - protected) <= 1, "and the one that the words look at most"
            assert not any("protected" in note for note in decision.notes)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_alone_and_together(family):
    samples, kept = prompts.batch(family, "ragged"), {}
    for spec in ("mustdrop-keys", LLM, f"mustdrop-keys + {LLM}", f"uniform(keep=20) + {LLM}"):
        with tokensieve.attach(models.tiny_model(family), spec) as sieve, torch.no_grad():
            models.tiny_model(family)(**prompts.collate(family, samples))
            kept[spec] = [set(row[0].kept.tolist()) for row in sieve.last]
            notes = " ".join(note for row in sieve.last for note in row[0].notes)
        assert ("no token was protected" in notes) == ("llm" in spec and "keys" not in spec)
    assert all(len(row) == 25 for row in kept["mustdrop-keys"])
    assert kept[LLM] != kept[f"mustdrop-keys + {LLM}"]


def test_padding_among_the_words_changes_no_decision():
    g = torch.Generator().manual_seed(0)
    queries = torch.rand(1, 2, 3, 12, generator=g)
    (method,) = parse("mustdrop-llm(together=1.0, single=9.0)")
    real = torch.tensor([[True, False, True]])
    text = DecoderUserText(torch.zeros(1, 3, 1), real)
    masked = method(DecoderTokens(torch.zeros(1, 12, 1), attention=queries, user_text=text))
    without = method(DecoderTokens(torch.zeros(1, 12, 1), attention=queries[:, :, ::2]))
    assert masked[0].kept.tolist() == without[0].kept.tolist()
    assert 1 <= masked[0].slots < 12
