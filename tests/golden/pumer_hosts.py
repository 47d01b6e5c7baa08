"""ViLT and METER of one layer, whose weights and inputs are given: PuMer is attached to them as to any model."""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import ViltConfig, ViltModel

import tokensieve
from tokensieve import parse
from tokensieve.fusion.convert.names import renamed
from tokensieve.fusion.meter import MeterConfig
from tokensieve.fusion.meter.modeling import MeterModel

RELEVANCE = {"mean_head": "mean_head", "first_head": "first_head", "k_metric": "key_key", "qk": "query_key"}


def official(prune, merge, merge_text, layers, relevance="mean_head"):
    """Return the method as in the authors' code."""
    (method,) = parse(
        "pumer",
        layers=tuple(layers),
        prune=prune,
        merge=merge,
        merge_text=merge_text,
        relevance=RELEVANCE[relevance],
        official_order=True,
        official_padding=True,
        official_rounding=True,
    )
    return method


class GivenEmbeddings(nn.Module):
    """Embeddings that are given, in the place of ViLT's."""

    def __init__(self, rows, mask):
        super().__init__()
        self.rows, self.mask = rows, mask

    def forward(self, *args, **kwargs):
        return self.rows, self.mask


class GivenStream(nn.Module):
    """An encoder of METER whose rows are given."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.post_layernorm = rows, nn.Identity()

    def forward(self, *args, **kwargs):
        return SimpleNamespace(last_hidden_state=self.rows)


def vilt_block(rows, mask, words, weights, heads, method, epsilon=1e-6):
    """Return the rows behind a ViLT of one layer with ``method`` attached, from rows `[B, words + I, D]`."""
    width = rows.shape[-1]
    config = ViltConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        layer_norm_eps=epsilon,
        vocab_size=5,
        image_size=32,
    )
    model = ViltModel(config, add_pooling_layer=False).eval()
    theirs = {f"vilt.transformer.blocks.0.{name}": weight for name, weight in weights.items()}
    model.encoder.layer[0].load_state_dict({n.split(".", 4)[4]: w for n, w in renamed(theirs, "vilt", "")})
    model.embeddings, model.layernorm = GivenEmbeddings(rows, mask), nn.Identity()
    with tokensieve.attach(model, method), torch.no_grad():
        ids, pixels = torch.zeros(len(rows), words, dtype=torch.long), torch.zeros(len(rows), 3, 32, 32)
        return model(ids, pixel_values=pixels).last_hidden_state


def meter_layer(text, image, text_mask, weights, heads, method):
    """Return the rows of text and image behind the text layer of METER's one pair, and the text's attention bias."""
    width = text.shape[-1]
    tower = {"hidden_size": width, "num_hidden_layers": 0, "num_attention_heads": 1}
    config = MeterConfig(
        text_config={**tower, "vocab_size": 5},
        vision_config={**tower, "image_size": 32},
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        intermediate_size=len(weights["intermediate.dense.bias"]),
        own_key_visible=True,
    )
    model, entered = MeterModel(config).eval(), {}
    model.cross_modal_text_layers[0].load_state_dict(weights)
    model.text_model, model.vision_model = GivenStream(text), GivenStream(image)
    model.cross_modal_text_transform = model.cross_modal_image_transform = nn.Identity()
    nn.init.zeros_(model.token_type_embeddings.weight)

    def note(layer, args, kwargs):
        entered["image"], entered["text"] = args
        entered["bias"] = kwargs["encoder_attention_mask"]

    with tokensieve.attach(model, method), torch.no_grad():
        model.cross_modal_image_layers[0].register_forward_pre_hook(note, with_kwargs=True)
        model(torch.zeros_like(text_mask), text_mask, pixel_values=torch.zeros(1))
    return entered["text"], entered["image"], entered["bias"]


def own_key_visible(text_mask, queries):
    """Return the attention mask `[B, 1, queries, T]` of PuMer's code: a query attends to the key of its own index."""
    own = torch.arange(queries)[:, None] == torch.arange(text_mask.shape[1])
    return text_mask[:, None, None].float().masked_fill(own, 1)
