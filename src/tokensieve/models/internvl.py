"""InternVL: adjacent tiles and a thumbnail in the prompt; pixel shuffle joins 2x2 patches per token."""

from __future__ import annotations

from typing import Any

from tokensieve.models.family import Family


class InternVL(Family):
    name = "internvl"
    title = "InternVL"
    model_types = ("internvl",)
    joins_tiles = True

    def merge(self, model: Any) -> int:
        return round(1 / float(model.config.downsample_ratio))
