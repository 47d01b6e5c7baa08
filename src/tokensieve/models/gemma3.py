"""Gemma 3: SigLIP, pooled to a fixed number of tokens that attend to each other. Each crop is an image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokensieve.models.family import Family


class Gemma3(Family):
    name = "gemma3"
    title = "Gemma 3"
    model_types = ("gemma3",)
    per_layer_masks = True

    def projector(self, model: Any) -> nn.Module:
        norm: nn.Module = model.base_model.multi_modal_projector.mm_soft_emb_norm  # first module after the pooling
        return norm

    def merge(self, model: Any) -> int:
        return int(model.base_model.multi_modal_projector.kernel_size)

    def project(self, model: Any, rows: Tensor) -> Tensor:
        weight: Tensor = model.base_model.multi_modal_projector.mm_input_projection_weight
        projected: Tensor = self.projector(model)(rows) @ weight
        return projected.type_as(rows)
