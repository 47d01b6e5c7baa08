"""Evidence from the vision encoder for connector methods: read on live models, against an eager twin."""

import pytest
import torch

import tokensieve
from tests.support import models, oracle, prompts
from tests.support.methods import evidence


def received(family, samples, needs):
    """What a method with these needs receives, per group of equal images."""
    return evidence(models.tiny_model(family), prompts.collate(family, samples), needs)[0]


def test_clip_evidence_is_that_of_an_eager_encoder():
    family, (s, *_) = "llava-clip", prompts.batch("llava-clip", "ragged")
    needs = tokensieve.Needs(
        cls_attention=-2,
        cls_attention_single_head=-1,
        attention_received=-2,
        encoder_keys=slice(-2, None),
        patches=True,
    )
    (image,) = received(family, [s], needs)
    tower = models.unhooked(family, "eager").model.vision_tower
    with torch.no_grad():
        out = tower(s.images[0].pixels, output_attentions=True, output_hidden_states=True)
    attention = out.attentions[-2][0].mean(0)
    torch.testing.assert_close(image.cls_attention[-2][0], attention[0, 1:])
    torch.testing.assert_close(image.attention_received[-2][0], attention.mean(0)[1:])
    torch.testing.assert_close(image.patches[0], out.hidden_states[-2][0, 1:])
    last = tower.encoder.layers[-1]
    with torch.no_grad():
        rows = last.layer_norm1(out.hidden_states[-2][0])
        query, key = last.self_attn.q_proj(rows), last.self_attn.k_proj(rows)
    torch.testing.assert_close(image.encoder_keys[-1][0].flatten(1), key[1:])
    wide = (query[0] @ key.T / query.shape[-1] ** 0.5).softmax(-1)[1:]
    torch.testing.assert_close(image.cls_attention_single_head[-1][0], wide)
    assert image.notes == ()


@pytest.mark.parametrize("family", ["llava-siglip", "qwen2.5-vl", "qwen3-vl"])
def test_encoders_without_cls_note_the_substitute(family):
    samples = prompts.batch(family, "single")
    needs = tokensieve.Needs(cls_attention=0, attention_received=0, patches=True)
    (image,) = received(family, samples, needs)
    assert any("no [CLS] token" in note for note in image.notes)
    torch.testing.assert_close(image.cls_attention[0], image.attention_received[0])
    unprojected = oracle.unprojected(models.unhooked(family), family, samples[0].images[0])
    torch.testing.assert_close(image.patches[0], unprojected)
    (image,) = received(family, samples, tokensieve.Needs(attention_received=-1))
    assert image.notes == (), "attention received is what was asked for: no substitute"
