"""Against the authors' code: matching, ViLT block, METER layer, and both models end to end through the converter."""

import torch
from torch import nn
from torch.testing import assert_close
from transformers import ViltConfig, ViltModel

import tokensieve
from tests.golden.vectors import CLOSE, cases, load, split_weights
from tests.support.crossmodal import logits
from tokensieve import parse
from tokensieve.crossmodal import CrossModal, Merge, ModalityStream
from tokensieve.fusion.convert import build
from tokensieve.fusion.convert.names import renamed
from tokensieve.fusion.meter import MeterConfig
from tokensieve.fusion.meter.modeling import MeterCoAttentionLayer
from tokensieve.ops import epsilon_attention, mask_bias

RELEVANCE = {"mean_head": "mean_head", "first_head": "first_head", "k_metric": "key_key", "qk": "query_key"}


def official(settings, layers):
    """The method with the authors' settings, order and treatment of padding."""
    (method,) = parse(
        "pumer",
        layers=tuple(layers),
        prune=settings["prune_r"],
        merge=settings["merge_r"],
        merge_text=settings["merge_text"],
        relevance=RELEVANCE[settings.get("sim_method", "mean_head")],
        official_order=True,
        official_padding=True,
    )
    return method


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


class Given(nn.Module):
    """Embeddings that are given, in the place of ViLT's."""

    def __init__(self, rows, mask):
        super().__init__()
        self.rows, self.mask = rows, mask

    def forward(self, *args, **kwargs):
        return self.rows, self.mask


@cases("pumer_vilt_block")
def test_vilt_block(name):
    inputs, outputs, settings = load("pumer_vilt_block", name)
    inputs, weights = split_weights(inputs)
    width, words = settings["dim"], settings["text_len"]
    config = ViltConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=settings["num_heads"],
        intermediate_size=4 * width,
        layer_norm_eps=settings["layer_norm_eps"],
        vocab_size=5,
        image_size=32,
    )
    model = ViltModel(config, add_pooling_layer=False).eval()
    theirs = {f"vilt.transformer.blocks.0.{name}": weight for name, weight in weights.items()}
    model.encoder.layer[0].load_state_dict({n.split(".", 4)[4]: w for n, w in renamed(theirs, "vilt", "")})
    model.embeddings, model.layernorm = Given(inputs["x"], inputs["mask"]), nn.Identity()
    rows = len(inputs["x"])
    with tokensieve.attach(model, official(settings, [0])), torch.no_grad():
        out = model(torch.zeros(rows, words, dtype=torch.long), pixel_values=torch.zeros(rows, 3, 32, 32))
    assert_close(out.last_hidden_state, outputs["new_x"], **CLOSE)


@cases("pumer_meter_crosslayer")
def test_meter_layer(name):
    inputs, outputs, settings = load("pumer_meter_crosslayer", name)
    inputs, weights = split_weights(inputs)
    width, heads = settings["hidden_size"], settings["num_heads"]
    config = MeterConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=width * settings["mlp_ratio"])
    layer = MeterCoAttentionLayer(config).eval()
    layer.load_state_dict(weights)
    text, image = inputs["hidden_states"], inputs["encoder_hidden_states"]
    words, mask = text.shape[1], inputs["text_masks"]

    def split(rows):
        return rows.unflatten(-1, (heads, -1)).transpose(1, 2)

    def attend(heads, rows, context, bias):
        """Attention with the authors' softmax, which matters where a row's strongest key is padding."""
        parts = epsilon_attention(split(heads.query(rows)), split(heads.key(context)), bias) @ split(
            heads.value(context)
        )
        return parts.transpose(1, 2).flatten(2)

    with torch.no_grad():
        bias = mask_bias(mask, text.dtype, words)
        mixed = layer.attention.output(attend(layer.attention.self, text, text, bias), text)
        cross = layer.crossattention.self
        key = split(cross.key(image))
        streams = [ModalityStream(m.float(), (m.shape[1],) * len(m)) for m in (mask, inputs["image_masks"])]
        text_key = split(layer.attention.self.key(text))
        seen = CrossModal(*streams, split(cross.query(mixed)), key, None, text_key, key)
        merged_text, merged_image = official(settings, [0]).reduce_pair(seen)
        every = mask_bias(inputs["image_masks"], text.dtype, words)
        rows = layer.crossattention.output(attend(cross, mixed, image, every), mixed)
        rows = rows if merged_text is None else merged_text.apply(rows)
        assert_close(layer.output(layer.intermediate(rows), rows), outputs["new_text"], **CLOSE)
    if merged_text is not None:
        assert_close(streams[0].reduced(merged_text, average=True).mask, outputs["new_text_masks"], **CLOSE)
    if settings["merge_r"]:
        assert_close(merged_image.apply(image), outputs["new_image"], **CLOSE)
    else:  # the authors' code computes the pruned image and throws it away; ours prunes
        assert merged_image.apply(image).shape[1] == image.shape[1] - round(settings["prune_r"] * image.shape[1])


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
    with tokensieve.attach(model, official(settings, settings["reduce_layers"])):
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
    with tokensieve.attach(model, official(settings, pairs)):
        assert_close(logits(model, given), outputs["logits"], **CLOSE)
