"""Against the authors' code: matching, ViLT block, METER layer, and both models end to end through the converter."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.testing import assert_close
from transformers import ViltConfig, ViltModel

import tokensieve
from tests.golden.vectors import CLOSE, cases, load, split_weights
from tests.support.crossmodal import logits
from tokensieve import parse
from tokensieve.crossmodal import Merge
from tokensieve.fusion.convert import build
from tokensieve.fusion.convert.names import renamed
from tokensieve.fusion.meter import MeterConfig
from tokensieve.fusion.meter.modeling import MeterModel

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
        official_rounding=True,
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


class GivenStream(nn.Module):
    """An encoder of METER whose rows are given."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.post_layernorm = rows, nn.Identity()

    def forward(self, *args, **kwargs):
        return SimpleNamespace(last_hidden_state=self.rows)


def meter_of_one_pair(inputs, weights, settings):
    """METER with one pair of layers, whose text layer and both inputs are given."""
    width = settings["hidden_size"]
    config = MeterConfig(
        text_config={"vocab_size": 5, "hidden_size": width, "num_hidden_layers": 0, "num_attention_heads": 1},
        vision_config={"hidden_size": width, "num_hidden_layers": 0, "num_attention_heads": 1, "image_size": 32},
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=settings["num_heads"],
        intermediate_size=width * settings["mlp_ratio"],
        own_key_visible=True,
    )
    model = MeterModel(config).eval()
    model.cross_modal_text_layers[0].load_state_dict(weights)
    model.text_model, model.vision_model = (
        GivenStream(inputs[name]) for name in ("hidden_states", "encoder_hidden_states")
    )
    model.cross_modal_text_transform = model.cross_modal_image_transform = nn.Identity()
    nn.init.zeros_(model.token_type_embeddings.weight)
    return model


@cases("pumer_meter_crosslayer")
def test_meter_layer(name):
    inputs, outputs, settings = load("pumer_meter_crosslayer", name)
    inputs, weights = split_weights(inputs)
    assert inputs["image_masks"].all()
    model, entered = meter_of_one_pair(inputs, weights, settings), {}

    def note(layer, args, kwargs):
        entered["image"], entered["text"] = args
        entered["text_mask"] = kwargs["encoder_attention_mask"]

    with tokensieve.attach(model, official(settings, [0])), torch.no_grad():
        model.cross_modal_image_layers[0].register_forward_pre_hook(note, with_kwargs=True)
        model(torch.zeros_like(inputs["text_masks"]), inputs["text_masks"], pixel_values=torch.zeros(1))
    exact = {"atol": 2e-6, "rtol": 2e-6}  # 3e-5 would hide half of what the ordinary softmax changes in c0
    assert_close(entered["text"], outputs["new_text"], **exact)
    assert_close(entered["image"], outputs["new_image"], **exact)
    queries = torch.arange(len(outputs["new_image"][0]))[:, None]
    own = queries == torch.arange(outputs["new_text_masks"].shape[1])  # a query attends to the key of its own index
    mask = outputs["new_text_masks"][:, None, None].float().masked_fill(own, 1)
    assert_close(entered["text_mask"].exp(), mask, **exact)


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
