"""Rename the parameters of LLaVA's original code to those of transformers, and set apart what a method adds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

TOWER = "model.vision_tower.vision_tower."
PROJECTOR = "model.multi_modal_projector."
RULES = {
    r"model\.mm_projector\.0\.(weight|bias)": PROJECTOR + r"linear_1.\1",
    r"model\.mm_projector\.2\.(weight|bias)": PROJECTOR + r"linear_2.\1",
    r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)": r"model.vision_tower.\1",
    r"model\.(layers\.\d+)\.decoder_layer\.(.+)": r"model.language_model.\1.\2",  # p-MoD puts a layer into another
    r"model\.((?:layers|embed_tokens|norm)\..+)": r"model.language_model.\1",
}
# buffers that transformers no longer stores
IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|position_ids)")


@dataclass(frozen=True)
class Extra:
    """Tensors that a method adds to LLaVA.

    Attributes:
        title: what they are.
        names: a pattern of their names.
        projects: they take the projector's place.
    """

    title: str
    names: str
    projects: bool = False


PACKER = "q_proj_1|k_proj_1|v_proj_1|ln_q_1|ln_k_1|ln_v_1|clip_attn|mlp"
EXTRAS = (
    Extra("the routers of p-MoD", r"model\.layers\.\d+\.router\.router\.(weight|bias)"),
    Extra("the resampler of MQT", r"model\.query_abstractor\..+", projects=True),
    Extra("the projector of TokenPacker", rf"model\.mm_projector\.({PACKER})\..+", projects=True),
    Extra("the compressor and the blocks of LLaVA-Mini", r"model\.(compressor|prefusion_layers)\..+"),
)


def renamed(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[Extra, list[str]]]:
    """Return the weights under the names of transformers, and the names that belong to a method.

    Unknown names do not change. Router and block have the same stem, so methods are asked first.
    """
    new: dict[str, Tensor] = {}
    apart: dict[Extra, list[str]] = {}
    for name, tensor in weights.items():
        extra = next((extra for extra in EXTRAS if re.fullmatch(extra.names, name)), None)
        if extra is not None:
            apart.setdefault(extra, []).append(name)
        elif not IGNORED.fullmatch(name):
            new[_renamed(name)] = tensor
    return new, apart


def _renamed(name: str) -> str:
    pattern = next((pattern for pattern in RULES if re.fullmatch(pattern, name)), None)
    return name if pattern is None else re.sub(pattern, RULES[pattern], name)


def has_tower(names: Iterable[str]) -> bool:
    """Return whether a vision encoder is among parameters under the authors' names."""
    return any(name.startswith(TOWER) for name in names)
