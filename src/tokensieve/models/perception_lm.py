"""PerceptionLM: a thumbnail and adjacent tiles; timm's Perception Encoder, average-pooled after the projector."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.models.family import EncodeCall, Family, timm_attentions
from tokensieve.models.layout import Grid, TokenLayout


class PerceptionLM(Family):
    name = "perception-lm"
    title = "PerceptionLM (images)"
    model_types = ("perception_lm",)

    def attentions(self, tower: Any) -> list[nn.Module]:
        return timm_attentions(tower.timm_model.blocks)

    def merge(self, model: Any) -> int:
        return int(model.config.projector_pooling_ratio)

    def layouts(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        images, tiles = call.inputs["pixel_values"].shape[:2]
        (height, width), (rows, _) = self.tile(model, call), self._patches_of_tile(model, call)
        divides = rows % self.merge(model) == 0  # otherwise the averaged squares of patches overlap
        return [TokenLayout(tiles * height * width, ((height, width),) * tiles, mapped=divides)] * images

    def features_per_image(self, pooled: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        tiles = len(layouts[0].views)
        return [torch.cat(list(pooled[first : first + tiles])) for first in range(0, len(pooled), tiles)]

    def patches(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        return self.in_units(model, call, rows).flatten(1)

    def project(self, model: Any, rows: Tensor) -> Tensor:
        tiles = torch.unflatten(rows, -1, (self.merge(model) ** 2, -1))  # the projector pools: each unit is a tile
        projected: Tensor = self.projector(model)(tiles)
        return projected.squeeze(1)

    def _patches_of_tile(self, model: Any, call: EncodeCall) -> Grid:
        side = isqrt(call.output.last_hidden_state.shape[1] - int(model.config.vision_use_cls_token))
        return side, side
