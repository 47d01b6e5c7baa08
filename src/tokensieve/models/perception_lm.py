"""PerceptionLM: a thumbnail and tiles side by side, average-pooled; its tower is timm's."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from tokensieve.models.family import EncodeCall, Family
from tokensieve.models.shape import Shape


class PerceptionLM(Family):
    name = "perception-lm"
    title = "PerceptionLM (images)"
    model_types = ("perception_lm",)
    opaque = "its tower is timm's, whose attention cannot be read"

    def shapes(self, model: Any, call: EncodeCall) -> list[Shape]:
        images, tiles = call.inputs["pixel_values"].shape[:2]
        side = isqrt(call.output.pooler_output.shape[1])
        return [Shape(tiles * side * side, ((side, side),) * tiles)] * images

    def entries(self, pooled: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        tiles = len(shapes[0].views)
        return [torch.cat(list(pooled[first : first + tiles])) for first in range(0, len(pooled), tiles)]
