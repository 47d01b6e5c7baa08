"""Build a model from the authors' weights; refuse weights that do not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    PreTrainedModel,
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
)

from tokensieve.errors import Refusal
from tokensieve.fusion.convert.fit import check_fit
from tokensieve.fusion.convert.names import HEADS, prefixed, renamed
from tokensieve.fusion.convert.read import read_settings, read_weights
from tokensieve.fusion.meter import (
    MeterConfig,
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
)

ARCHITECTURES = {
    "vilt": (ViltForQuestionAnswering, ViltForImagesAndTextClassification, ViltForImageAndTextRetrieval),
    "meter": (MeterForQuestionAnswering, MeterForImagesAndTextClassification, MeterForImageAndTextRetrieval),
}


def convert(source: Path, target: Path, *, heads: int | None = None) -> PreTrainedModel:
    """Convert the authors' checkpoint into a folder for ``from_pretrained``.

    Args:
        source: a weight file, or a folder with a weight file and, optionally, the authors' config.json.
        target: folder to write.
        heads: attention heads, which weights do not show. The default is that of config.json, or one per 64 columns.

    Raises:
        Refusal: if there is no checkpoint or no known head, or a weight is missing, unexpected or of another shape.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Refusal(f"{target} exists already; give an empty or a new folder")
    settings = read_settings(source)
    model = build(read_weights(source), heads=heads or settings.get("num_heads"))
    model.save_pretrained(target)
    return model


def build(weights: Mapping[str, Tensor], *, heads: int | None = None) -> PreTrainedModel:
    """Build the model of the authors' ``weights`` in eval mode; arguments and errors are those of :func:`convert`."""
    kind = "meter" if any("cross_modal_text_layers" in name for name in weights) else "vilt"
    weights = prefixed(weights, kind)
    head, labels = _head(weights)
    config = (_meter_config if kind == "meter" else _vilt_config)(weights, heads)
    config.num_labels = labels
    model = ARCHITECTURES[kind][head](config)
    tower = _clip_path(model) if kind == "meter" else ""
    converted = dict(renamed(weights, kind, tower))
    check_fit(converted, model.state_dict(), type(model).__name__)
    model.load_state_dict(converted)
    return model.eval()


def _head(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the index of the architecture in :data:`ARCHITECTURES`, and the number of labels."""
    for name in HEADS:
        if f"{name}.3.bias" in weights:
            return int(name == "nlvr2_classifier"), len(weights[f"{name}.3.bias"])
    if "rank_output.bias" in weights:
        return 2, 1
    known = ", ".join((*HEADS, "rank_output"))
    raise Refusal(f"this checkpoint has no head that we know; expected the weights of one of {known}")


def _vilt_config(weights: Mapping[str, Tensor], heads: int | None) -> ViltConfig:
    vocabulary, width = _shape(weights, "vilt.text_embeddings.word_embeddings.weight")
    patch = _shape(weights, "vilt.transformer.patch_embed.proj.weight")[-1]
    types = _shape(weights, "vilt.token_type_embeddings.weight")[0]
    return ViltConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=_depth(weights, r"vilt\.transformer\.blocks\.(\d+)\."),
        num_attention_heads=heads or max(width // 64, 1),
        intermediate_size=_shape(weights, "vilt.transformer.blocks.0.mlp.fc1.bias")[0],
        image_size=_side(_shape(weights, "vilt.transformer.pos_embed")[1]) * patch,
        patch_size=patch,
        max_position_embeddings=_shape(weights, "vilt.text_embeddings.position_embeddings.weight")[0],
        modality_type_vocab_size=types,
        num_images=2 if any(name.startswith("nlvr2") for name in weights) else -1,
        layer_norm_eps=1e-6,
    )


def _meter_config(weights: Mapping[str, Tensor], heads: int | None) -> MeterConfig:
    tower = "meter.vit_model.visual." if any(".vit_model.visual." in n for n in weights) else "meter.vit_model."
    vocabulary, text_width = _shape(weights, "meter.text_transformer.embeddings.word_embeddings.weight")
    vision_width, _, _, patch = _shape(weights, f"{tower}conv1.weight")
    width = _shape(weights, "meter.cross_modal_text_transform.bias")[0]

    def heads_of(columns: int) -> int:
        return heads or max(columns // 64, 1)

    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "num_hidden_layers": _depth(weights, r"meter\.text_transformer\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": heads_of(text_width),
        "intermediate_size": _shape(weights, "meter.text_transformer.encoder.layer.0.intermediate.dense.bias")[0],
        "max_position_embeddings": _shape(weights, "meter.text_transformer.embeddings.position_embeddings.weight")[0],
        "type_vocab_size": _shape(weights, "meter.text_transformer.embeddings.token_type_embeddings.weight")[0],
        "layer_norm_eps": 1e-5,
    }
    vision = {
        "hidden_size": vision_width,
        "num_hidden_layers": _depth(weights, re.escape(tower) + r"transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": heads_of(vision_width),
        "intermediate_size": _shape(weights, f"{tower}transformer.resblocks.0.mlp.c_fc.bias")[0],
        "image_size": _side(_shape(weights, f"{tower}positional_embedding")[0]) * patch,
        "patch_size": patch,
    }
    return MeterConfig(
        text_config=text,
        vision_config=vision,
        hidden_size=width,
        num_hidden_layers=_depth(weights, r"meter\.cross_modal_text_layers\.(\d+)\."),
        num_attention_heads=heads_of(width),
        intermediate_size=_shape(weights, "meter.cross_modal_text_layers.0.intermediate.dense.bias")[0],
        modality_type_vocab_size=_shape(weights, "meter.token_type_embeddings.weight")[0],
        own_key_visible=True,
    )


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in weights:
        raise Refusal(f"this is not a ViLT or METER checkpoint of the authors, because {name} is missing")
    return tuple(weights[name].shape)


def _depth(weights: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(m[1]) for m in map(re.compile(pattern).match, weights) if m), default=-1)


def _side(positions: int) -> int:
    """Return the patches per side of a square image, from its positions with [CLS]."""
    return math.isqrt(positions - 1)


def _clip_path(model: Any) -> str:
    name = next(n for n, _ in model.named_parameters() if n.endswith("embeddings.class_embedding"))
    return str(name).removesuffix(".embeddings.class_embedding")
