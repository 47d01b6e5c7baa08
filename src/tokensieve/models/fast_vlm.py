"""FastVLM: a convolutional tower, one visual token per cell of its feature map."""

from __future__ import annotations

from typing import Any

from tokensieve.models.family import EncodeCall, Family
from tokensieve.models.shape import Shape


class FastVlm(Family):
    name = "fast-vlm"
    title = "FastVLM"
    model_types = ("fast_vlm",)
    opaque = "its tower is convolutional"

    def shapes(self, model: Any, call: EncodeCall) -> list[Shape]:
        images, _, height, width = call.output.last_hidden_state.shape
        return [Shape.grid_of(height, width)] * images
