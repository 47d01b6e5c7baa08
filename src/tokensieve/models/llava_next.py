"""LLaVA-NeXT (LLaVA-1.6): tiles of any resolution, and newline tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokensieve.models.any_resolution import AnyResolution
from tokensieve.models.family import EncodeCall


class LlavaNext(AnyResolution):
    name = "llava-next"
    title = "LLaVA-NeXT"
    model_types = ("llava_next",)

    def pack(self, model: Any, call: EncodeCall, rows: list[Tensor], newline: Tensor) -> list[Tensor]:
        packed, _ = model.base_model.pack_image_features(rows, call.sizes, "full", image_newline=newline)
        return list(packed)
