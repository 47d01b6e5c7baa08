"""Against the authors' code: matching, ViLT block, METER layer, and both models end to end through the converter."""

import torch
from torch.testing import assert_close

import tokensieve
from tests.golden.pumer_hosts import meter_layer, official, own_key_visible, vilt_block
from tests.golden.vectors import CLOSE, cases, load, split_weights
from tests.support.crossmodal import logits
from tokensieve.crossmodal import Merge
from tokensieve.fusion.convert import build


def method(settings, layers):
    """Return the method with the authors' settings."""
    shares = (settings[name] for name in ("prune_r", "merge_r", "merge_text"))
    return official(*shares, layers, settings.get("sim_method", "mean_head"))


@cases("pumer_bipartite")
def test_bipartite_matching(name):
    inputs, outputs, settings = load("pumer_bipartite", name)
    rows, total, _ = inputs["x"].shape
    pairs = min(settings["r"], (total - 1) // 2)
    every = torch.arange(total).expand(rows, -1)
    merge = Merge.of(every, [total] * rows, inputs["metric"], [pairs] * rows, in_place=False)
    size = inputs["size"].squeeze(-1) if "size" in inputs else None
    assert_close(merge.apply(inputs["x"], size), outputs["merged"], **CLOSE)
    assert_close(merge.sizes(size), outputs["merged_size"].squeeze(-1), **CLOSE)


@cases("pumer_vilt_block")
def test_vilt_block(name):
    inputs, outputs, settings = load("pumer_vilt_block", name)
    inputs, weights = split_weights(inputs)
    heads, words, epsilon = settings["num_heads"], settings["text_len"], settings["layer_norm_eps"]
    rows = vilt_block(inputs["x"], inputs["mask"], words, weights, heads, method(settings, [0]), epsilon)
    assert_close(rows, outputs["new_x"], **CLOSE)


@cases("pumer_meter_crosslayer")
def test_meter_layer(name):
    inputs, outputs, settings = load("pumer_meter_crosslayer", name)
    inputs, weights = split_weights(inputs)
    assert inputs["image_masks"].all()
    given = (inputs[part] for part in ("hidden_states", "encoder_hidden_states", "text_masks"))
    text, image, bias = meter_layer(*given, weights, settings["num_heads"], method(settings, [0]))
    exact = {"atol": 2e-6, "rtol": 2e-6}  # 3e-5 would hide much of what the ordinary softmax changes
    assert_close(text, outputs["new_text"], **exact)
    assert_close(image, outputs["new_image"], **exact)
    assert_close(bias.exp(), own_key_visible(outputs["new_text_masks"], image.shape[1]), **exact)


@cases("pumer_vilt_vqa")
def test_vilt_end_to_end(name):
    inputs, outputs, settings = load("pumer_vilt_vqa", name)
    inputs, weights = split_weights(inputs)
    model = build(weights, heads=settings["config"]["num_heads"])
    given = {
        "input_ids": inputs["text_ids"],
        "attention_mask": inputs["text_masks"],
        "image_embeds": outputs["image_embeds"],
        "pixel_mask": outputs["image_masks"],
    }
    assert_close(logits(model, given), outputs["logits_full"], **CLOSE)
    with tokensieve.attach(model, method(settings, settings["reduce_layers"])):
        assert_close(logits(model, given), outputs["logits"], **CLOSE)
    assert_close(logits(model, given), outputs["logits_full"], **CLOSE)


@cases("pumer_vilt_vqa")
def test_vilt_embeds_the_same_patches(name):
    inputs, outputs, settings = load("pumer_vilt_vqa", name)
    inputs, weights = split_weights(inputs)
    model = build(weights, heads=settings["config"]["num_heads"])
    pixels = inputs["pixel_values"]
    torch.manual_seed(settings["rng_seed"])
    with torch.no_grad():
        embeds, mask, _ = model.vilt.embeddings.visual_embed(pixels, (pixels.sum(1) != 0).long(), -1)
    assert_close(embeds, outputs["image_embeds"], **CLOSE)
    assert torch.equal(mask, outputs["image_masks"])


@cases("pumer_meter_vqa")
def test_meter_end_to_end(name):
    inputs, outputs, settings = load("pumer_meter_vqa", name)
    inputs, weights = split_weights(inputs)
    model = build(weights, heads=settings["config"]["num_heads"])
    given = {
        "input_ids": inputs["text_ids"],
        "attention_mask": inputs["text_masks"],
        "pixel_values": inputs["pixel_values"],
    }
    assert_close(logits(model, given), outputs["logits_full"], **CLOSE)
    pairs = [layer // 2 for layer in settings["reduce_layers"]]  # the authors count both layers of a pair
    with tokensieve.attach(model, method(settings, pairs)):
        assert_close(logits(model, given), outputs["logits"], **CLOSE)
