"""Towers of timm's and their stand-ins: who may read them, and that nobody else notices.

The laws and the evidence of the matrix run on real towers as well, where timm is installed.
"""

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

import tokensieve
from tests.support import families, models, prompts

TIMM = [name for name, family in families.FAMILIES.items() if family.classes in ("PerceptionLM", "FastVlm")]
each_name = pytest.mark.parametrize("name", TIMM)


def timm_of(model):
    return model.get_encoder(modality="image").timm_model


def attentions(model):
    return [module for module in timm_of(model).modules() if hasattr(module, "fused_attn")]


def one(name):
    return prompts.collate(name, prompts.batch(name, "single"))


@each_name
def test_attention_that_is_not_fused_cannot_be_read(name):
    model = models.build(name)
    for module in attentions(model):
        module.fused_attn = False
    before = models.footprint(model)
    with pytest.raises(ValueError, match="only be read where it is fused; unset TIMM_FUSED_ATTN"):
        tokensieve.attach(model, "fastervlm", keep=5)
    assert models.footprint(model) == before
    with tokensieve.attach(model, "divprune", keep=5) as sieve:
        model.generate(**one(name), max_new_tokens=1)
        assert sieve.last[0][0].slots == 5


@each_name
def test_methods_inside_timm_encoders_are_refused(name):
    with pytest.raises(ValueError, match="acts in the encoder, which is not supported in"):
        tokensieve.attach(models.tiny_model(name), "tome")


@each_name
def test_notes_name_the_substitute_for_the_cls_token(name):
    model = models.tiny_model(name)
    with tokensieve.attach(model, "fastervlm", keep=5) as sieve:
        model.generate(**one(name), max_new_tokens=1)
        notes = " ".join(sieve.last[0][0].notes)
    assert ("attention received" in notes) == (getattr(timm_of(model), "cls_token", None) is None)


@each_name
def test_only_the_layer_that_is_read_is_watched_and_only_in_an_encode_call(name):
    model, watched = models.tiny_model(name), []

    def look(projection, args):
        watched.append(projection if _get_current_function_mode_stack() else None)

    handles = [module.qkv.register_forward_pre_hook(look) for module in attentions(model)]
    read = attentions(model)[-2]
    with tokensieve.attach(model, "fastervlm", keep=5):
        model.generate(**one(name), max_new_tokens=1)
        assert watched == [read.qkv if module is read else None for module in attentions(model)]
        handles.append(read.proj.register_forward_pre_hook(lambda projection, args: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            model.generate(**one(name), max_new_tokens=1)
        assert not _get_current_function_mode_stack()
        handles.pop().remove()
        watched.clear()
        timm_of(model).forward_features(one(name)["pixel_values"].flatten(0, -4))
        assert set(watched) == {None}
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["fast-vlm", "perception-lm"])
@torch.no_grad()
def test_a_compiled_model(name):
    model, inputs = models.build(name), one(name)
    with tokensieve.attach(model, "fastervlm", keep=5):
        expected = model(**inputs).logits
        assert torch.equal(torch.compile(model, backend="eager")(**inputs).logits, expected)
    torch.compiler.reset()


def test_a_forward_that_was_replaced_before_is_put_back():
    model = models.build("perception-lm")
    read, expected = attentions(model)[-2], model(**one("perception-lm")).logits
    theirs = read.forward = lambda *args: type(read).forward(read, *args)
    with tokensieve.attach(model, "fastervlm", keep=1.0):
        assert torch.equal(model(**one("perception-lm")).logits, expected)
    assert read.forward is theirs


def test_an_encoder_whose_last_stage_does_not_attend_is_refused():
    model = models.build("fast-vlm")
    for block in timm_of(model).stages[-1].blocks:
        block["token_mixer"] = torch.nn.Identity()
    with pytest.raises(ValueError, match="TinyTower has no attention over all patches that could be read"):
        tokensieve.attach(model, "fastervlm", keep=5)


def test_pooling_that_shares_patches_between_tokens_is_refused():
    """Of 7 rows of patches, halving makes 3 rows of tokens that overlap."""
    model, inputs = models.build("perception-lm"), one("perception-lm")
    pixels = inputs["pixel_values"][..., :98, :98]
    ids = torch.tensor([[families.BOS, *[families.IMAGE] * 2 * 9, 7, 8]])
    with tokensieve.attach(model, "fastervlm", keep=5), pytest.raises(ValueError, match="resamples an image"):
        model(input_ids=ids, pixel_values=pixels)
    with tokensieve.attach(model, "divprune", keep=5) as sieve:
        model(input_ids=ids, pixel_values=pixels)
        assert (sieve.last[0][0].total, sieve.last[0][0].slots) == (18, 5)
