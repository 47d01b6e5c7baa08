"""Mistral 3: a Pixtral encoder of packed patches (images of any size), and a projector that merges 2x2 patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.errors import Refusal
from tokensieve.models.family import EncodeCall, Family, in_blocks
from tokensieve.models.layout import TokenLayout


class Mistral3(Family):
    name = "mistral3"
    title = "Mistral 3 (Pixtral tower)"
    model_types = ("mistral3",)

    def merge(self, model: Any) -> int:
        return int(model.config.spatial_merge_size)

    def layouts(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        side = model.config.vision_config.patch_size * self.merge(model)
        return [TokenLayout.grid_of(h // side, w // side) for h, w in call.sizes]

    def to_units(self, model: Any, call: EncodeCall, reads: Sequence[Tensor]) -> Tensor:
        (rows,) = reads  # one attention call for all images, with a block-diagonal mask
        grids, side = [layout.views[0] for layout in self.layouts(model, call)], self.merge(model)
        tower: Any = self.tower(model)
        if len(grids) > 1 and "flash" in tower.config._attn_implementation:
            raise Refusal("the attention of several images at once cannot be read from a flash kernel; use sdpa")
        images = torch.split(rows[0], [h * w * side**2 for h, w in grids])
        pairs = zip(images, grids, strict=True)
        return torch.cat([in_blocks(image[None], (h * side, w * side), side).mean(1) for image, (h, w) in pairs])

    def projector(self, model: Any) -> nn.Module:
        layer: nn.Module = model.base_model.multi_modal_projector.patch_merger.merging_layer
        return layer

    def project(self, model: Any, rows: Tensor) -> Tensor:
        mlp = model.base_model.multi_modal_projector  # `projector` is only its merging layer
        projected: Tensor = mlp.linear_2(mlp.act(mlp.linear_1(self.projector(model)(rows))))
        return projected
