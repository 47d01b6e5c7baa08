"""LLaVA-OneVision: tiles of any resolution for a single image, the base tile alone where a prompt has several."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokensieve.models.any_resolution import AnyResolution
from tokensieve.models.family import EncodeCall


class LlavaOnevision(AnyResolution):
    name = "llava-onevision"
    title = "LLaVA-OneVision (images)"
    model_types = ("llava_onevision",)

    def tiles(self, model: Any, call: EncodeCall) -> list[int]:
        tiles, counts = super().tiles(model, call), call.inputs.get("batch_num_images")
        alone = [True] * len(tiles) if counts is None else [int(n) == 1 for n in counts for _ in range(int(n))]
        return [count if own else 1 for count, own in zip(tiles, alone, strict=True)]

    def pack(self, model: Any, call: EncodeCall, rows: list[Tensor], newline: Tensor) -> list[Tensor]:
        ratio = call.inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        sizes = call.inputs["image_sizes"]
        packed, _ = model.base_model.pack_image_features(rows, sizes, newline, vision_aspect_ratio=ratio)
        return list(packed)
