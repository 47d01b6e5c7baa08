"""LLaVA-1.5: a CLIP or SigLIP encoder, an MLP projector, and one visual token per patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tokensieve.errors import Refusal
from tokensieve.models import vit
from tokensieve.models.family import Family, scatter_to_anchors
from tokensieve.models.layout import Grid
from tokensieve.reduction import Reduction

TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(Family):
    name = "llava"
    title = "LLaVA-1.5 (CLIP or SigLIP tower)"
    model_types = ("llava",)
    stages = ("encoder", "connector", "decoder")

    def describes(self, config: Any) -> bool:
        return super().describes(config) and config.vision_config.model_type != "pixtral"

    def tower(self, model: Any) -> nn.Module:
        tower = super().tower(model)
        model_type = getattr(tower.config, "model_type", None)
        if model_type not in TOWERS:
            raise Refusal(f"LLaVA with a {model_type} tower is not supported; supported: {', '.join(TOWERS)}")
        return tower

    def vit_layers(self, tower: Any) -> list[vit.VitLayer]:
        return vit.vit_layers(tower)

    def layers_used(self, model: Any) -> int:
        return vit.layers_used(self.tower(model), model.config.vision_feature_layer)

    def resize(self, tower: Any, inputs: dict[str, Any], cells: Sequence[Grid]) -> dict[str, Any]:
        patch, pixels = tower.config.patch_size, inputs["pixel_values"]
        size = (cells[0][0] * patch, cells[0][1] * patch)
        smaller = interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)
        return {**inputs, "pixel_values": smaller, "interpolate_pos_encoding": True}

    def restore(self, tower: Any, output: Any, reductions: Sequence[Reduction]) -> None:
        specials = int(self.has_cls(tower))

        def restored(rows: Tensor | None) -> Tensor | None:
            if rows is None:
                return None
            return torch.stack(
                [scatter_to_anchors(r, reduction, specials) for r, reduction in zip(rows, reductions, strict=True)]
            )

        output.last_hidden_state = restored(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(map(restored, output.hidden_states))
