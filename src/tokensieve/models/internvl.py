"""InternVL: tiles and a thumbnail, side by side in the prompt; 2x2 patches per token by pixel shuffle."""

from __future__ import annotations

from typing import Any

from tokensieve.models.family import Family


class InternVL(Family):
    name = "internvl"
    title = "InternVL"
    model_types = ("internvl",)
    joins = True

    def merge(self, model: Any) -> int:
        return round(1 / float(model.config.downsample_ratio))
