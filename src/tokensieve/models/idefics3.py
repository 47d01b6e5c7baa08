"""Idefics3 and SmolVLM: tiles with marker tokens between them (each tile is one image here), and pixel shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.models.family import EncodeCall
from tokensieve.models.layout import TokenLayout
from tokensieve.models.pixel_shuffle import PixelShuffle


class Idefics3(PixelShuffle):
    name = "idefics3"
    title = "Idefics3, SmolVLM"
    model_types = ("idefics3", "smolvlm")

    def features_per_image(self, pooled: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        return [tile for sample in pooled if len(sample) for tile in torch.split(sample, layouts[0].total)]

    def pixels_per_image(self, call: EncodeCall, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        return list(call.encoder_inputs["pixel_values"])  # the call's own are nested by sample, with empty tiles

    def projector(self, model: Any) -> nn.Module:
        connector: nn.Module = model.base_model.connector
        return connector

    def merge(self, model: Any) -> int:
        return int(model.config.scale_factor)
