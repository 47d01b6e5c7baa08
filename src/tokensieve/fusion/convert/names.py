"""Rename the authors' parameters to those of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

# heads of other pretraining losses, and buffers that transformers no longer stores
IGNORED = re.compile(r"(mlm_score|itm_score|mpp_score)\.|.*(position_ids|token_type_ids)$|.*token_pruner\.")
HEADS = {"vqa_classifier": "classifier", "ve_classifier": "classifier", "nlvr2_classifier": "classifier"}

_VILT = {
    r"vilt\.text_embeddings\.(.*)": r"vilt.embeddings.text_embeddings.\1",
    r"vilt\.token_type_embeddings\.(.*)": r"vilt.embeddings.token_type_embeddings.\1",
    r"vilt\.transformer\.cls_token": "vilt.embeddings.cls_token",
    r"vilt\.transformer\.pos_embed": "vilt.embeddings.position_embeddings",
    r"vilt\.transformer\.patch_embed\.proj\.(.*)": r"vilt.embeddings.patch_embeddings.projection.\1",
    r"vilt\.transformer\.blocks\.(\d+)\.norm1\.(.*)": r"vilt.encoder.layer.\1.layernorm_before.\2",
    r"vilt\.transformer\.blocks\.(\d+)\.norm2\.(.*)": r"vilt.encoder.layer.\1.layernorm_after.\2",
    r"vilt\.transformer\.blocks\.(\d+)\.attn\.qkv\.(.*)": r"vilt.encoder.layer.\1.attention.attention.{part}.\2",
    r"vilt\.transformer\.blocks\.(\d+)\.attn\.proj\.(.*)": r"vilt.encoder.layer.\1.attention.output.dense.\2",
    r"vilt\.transformer\.blocks\.(\d+)\.mlp\.fc1\.(.*)": r"vilt.encoder.layer.\1.intermediate.dense.\2",
    r"vilt\.transformer\.blocks\.(\d+)\.mlp\.fc2\.(.*)": r"vilt.encoder.layer.\1.output.dense.\2",
    r"vilt\.transformer\.norm\.(.*)": r"vilt.layernorm.\1",
}
_VIT = r"meter\.vit_model\.(?:visual\.)?"
_BLOCK = _VIT + r"transformer\.resblocks\.(\d+)\."
_METER = {
    r"meter\.text_transformer\.(.*)": r"meter.text_model.\1",
    _VIT + "class_embedding": "{tower}.embeddings.class_embedding",
    _VIT + "positional_embedding": "{tower}.embeddings.position_embedding.weight",
    _VIT + r"conv1\.weight": "{tower}.embeddings.patch_embedding.weight",
    _VIT + r"ln_pre\.(.*)": r"{tower}.pre_layrnorm.\1",
    _VIT + r"ln_post\.(.*)": r"{tower}.post_layernorm.\1",
    _BLOCK + r"attn\.in_proj_(.*)": r"{tower}.encoder.layers.\1.self_attn.{part}_proj.\2",
    _BLOCK + r"attn\.out_proj\.(.*)": r"{tower}.encoder.layers.\1.self_attn.out_proj.\2",
    _BLOCK + r"ln_(\d)\.(.*)": r"{tower}.encoder.layers.\1.layer_norm\2.\3",
    _BLOCK + r"mlp\.c_fc\.(.*)": r"{tower}.encoder.layers.\1.mlp.fc1.\2",
    _BLOCK + r"mlp\.c_proj\.(.*)": r"{tower}.encoder.layers.\1.mlp.fc2.\2",
}
_PARTS = {"vilt": ("query", "key", "value"), "meter": ("q", "k", "v")}


def prefixed(weights: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Prefix the names of the encoder's weights by ``kind.``, which the original training codes omit."""
    heads = (*HEADS, "rank_output", f"{kind}.")
    bare = {name: t for name, t in weights.items() if not IGNORED.match(name)}
    return {name if name.startswith(heads) else f"{kind}.{name}": t for name, t in bare.items()}


def renamed(weights: Mapping[str, Tensor], kind: str, tower: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the renamed weights, with joint query-key-value weights split in three. Unknown names do not change.

    Args:
        kind: "vilt" or "meter".
        tower: module path of METER's CLIP encoder.
    """
    rules = _VILT if kind == "vilt" else _METER
    for name, tensor in weights.items():
        head, _, suffix = name.partition(".")
        new = f"{HEADS[head]}.{suffix}" if head in HEADS else name
        for pattern, template in rules.items():
            if re.fullmatch(pattern, name):
                new = re.sub(pattern, template, name).replace("{tower}", tower)
                break
        if "{part}" in new:
            for part, rows in zip(_PARTS[kind], tensor.chunk(3), strict=True):
                yield new.replace("{part}", part), rows.clone()
        else:
            yield new, tensor
