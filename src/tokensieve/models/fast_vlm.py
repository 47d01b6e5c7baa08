"""FastVLM: timm's FastViT (convolutions, then attention) with one visual token per cell of its feature map."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokensieve.models.family import EncodeCall, Family, timm_attentions
from tokensieve.models.layout import Grid


class FastVlm(Family):
    name = "fast-vlm"
    title = "FastVLM"
    model_types = ("fast_vlm",)

    def attentions(self, tower: Any) -> list[nn.Module]:
        return timm_attentions(tower.timm_model.stages[-1])  # earlier stages have more and smaller patches

    def _patches_of_tile(self, model: Any, call: EncodeCall) -> Grid:
        height, width = call.output.last_hidden_state.shape[-2:]
        return height, width
