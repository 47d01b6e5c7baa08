"""SigLIP has no [CLS] token: its pooling head's row, where one layer at the end is wanted; else attention received."""

import pytest
import torch

import tokensieve
from tests.methods.encoder.rules import RULES
from tests.support import encoder_oracle, models, prompts
from tests.support.methods import evidence
from tokensieve import Needs

FAMILY = "llava-siglip"


def received(model, samples, needs, first=""):
    """The evidence of all images in the order of the batch, and the notes on it."""
    (image,), _ = evidence(model, prompts.collate(FAMILY, samples), needs, first)
    return image


@torch.no_grad()
def head_row(model, rows):
    """What torch's own attention module reports, mean over heads."""
    head = model.model.vision_tower.head
    return head.attention(head.probe, rows[None], rows[None], need_weights=True)[1][0, 0]


@pytest.mark.parametrize("layer", [-1, -2, slice(-2, -1), slice(-1, None)])
def test_the_row_is_the_heads_own(layer):
    model, (s,) = models.tiny_model(FAMILY), prompts.batch(FAMILY, "two-images")
    image = received(model, [s], Needs(cls_attention=layer))
    assert image.notes == (
        "no [CLS] token in this encoder: what its pooling head attends to in the last layer's output",
    )
    for i, shown in enumerate(s.images):
        with torch.no_grad():
            rows = models.unhooked(FAMILY).model.vision_tower(shown.pixels).last_hidden_state[0]
        expected = head_row(models.unhooked(FAMILY), rows)
        torch.testing.assert_close(image.cls_attention.stack(layer)[0, i], expected, atol=1e-6, rtol=1e-4)


def test_the_wide_row_has_one_head():
    model, (s,) = models.tiny_model(FAMILY), prompts.batch(FAMILY, "single")
    image = received(model, [s], Needs(cls_attention_single_head=-1))
    head = models.unhooked(FAMILY).model.vision_tower.head
    one = torch.nn.MultiheadAttention(32, 1, batch_first=True)
    one.load_state_dict(head.attention.state_dict())
    with torch.no_grad():
        rows = models.unhooked(FAMILY).model.vision_tower(s.images[0].pixels).last_hidden_state
        expected = one(head.probe, rows, rows, need_weights=True)[1][0, 0]
    torch.testing.assert_close(image.cls_attention_single_head[-1][0], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "needs", [Needs(cls_attention=slice(None, -1)), Needs(cls_attention=0), Needs(cls_attention=-3)]
)
def test_earlier_layers_and_ensembles_have_attention_received(needs):
    model, (s,) = models.tiny_model(FAMILY), prompts.batch(FAMILY, "single")
    image = received(model, [s], needs)
    (note,) = image.notes
    assert "attention received from all patches" in note
    both = Needs(cls_attention=needs.cls_attention, attention_received=needs.cls_attention)
    again = received(model, [s], both)
    for layer, rows in again.attention_received.items():
        assert torch.equal(again.cls_attention[layer], rows)
        assert torch.equal(image.cls_attention[layer], rows)


def test_each_kind_of_evidence_notes_its_substitute():
    needs = Needs(cls_attention=slice(None), cls_attention_single_head=-1)
    image = received(models.tiny_model(FAMILY), prompts.batch(FAMILY, "single"), needs)
    assert ["pooling head" in note for note in image.notes] == [True, False]


@pytest.mark.parametrize("how", ["config", "switch"])
def test_a_head_that_is_absent_or_not_in_use_is_not_read(how):
    model, samples = models.build(FAMILY), prompts.batch(FAMILY, "single")
    if how == "config":  # as checkpoints without a head are built
        del model.model.vision_tower.head
    model.model.vision_tower.use_head = False
    image = received(model, samples, Needs(cls_attention=-2, attention_received=-2))
    assert torch.equal(image.cls_attention[-2], image.attention_received[-2])
    assert "pooling head" not in " ".join(image.notes)


@pytest.mark.parametrize("spec", ["tome(keep=5)", "illava-encoder(keep=0.4)"])
def test_after_an_encoder_method_the_head_attends_to_the_tokens_that_are_left(spec):
    model, (s,) = models.tiny_model(FAMILY), prompts.batch(FAMILY, "single")
    image = received(model, [s], Needs(cls_attention=-1), first=spec)
    tower = models.unhooked(FAMILY).model.vision_tower
    with torch.no_grad():
        hand = encoder_oracle.run(tower, s.images[0].pixels, RULES[spec])
        query, key = (torch.nn.functional.linear(x, w, b) for x, w, b in zip(
            (tower.head.probe[0], tower.post_layernorm(hand.x)),
            tower.head.attention.in_proj_weight.chunk(3),
            tower.head.attention.in_proj_bias.chunk(3), strict=False,
        ))  # fmt: skip
        scores = (query.view(4, 1, 8) @ key.view(-1, 4, 8).permute(1, 2, 0)).squeeze(1) / 8**0.5
        if RULES[spec].proportional:
            scores = scores + torch.tensor(hand.sizes).log()
        expected = scores.softmax(-1).mean(0)[sorted(range(len(hand.places)), key=hand.places.__getitem__)]
    torch.testing.assert_close(image.cls_attention[-1][0], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("spec", ["fastervlm(keep=5)", "visionzip(keep=5)", "prumerge(keep=5)", "vtc-cls(keep=5)"])
def test_decisions_carry_the_note(spec):
    model, samples = models.tiny_model(FAMILY), prompts.batch(FAMILY, "ragged")
    with torch.no_grad(), tokensieve.attach(model, spec) as sieve:
        model(**prompts.collate(FAMILY, samples))
    for row in sieve.last:
        for decision in row:
            assert sum("no [CLS] token" in note for note in decision.notes) == 1
            assert any("pooling head" in note for note in decision.notes) == (spec != "vtc-cls(keep=5)")
