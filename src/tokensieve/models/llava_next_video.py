"""LLaVA-NeXT-Video: images as in LLaVA-NeXT; the frames of videos are pooled before the projector."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokensieve.models.family import EncodeCall, in_blocks
from tokensieve.models.layout import TokenLayout
from tokensieve.models.llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    name = "llava-next-video"
    title = "LLaVA-NeXT-Video"
    model_types = ("llava_next_video",)
    modalities = ("image", "video")

    def layouts(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        if call.modality == "image":
            return super().layouts(model, call)
        videos, frames = call.inputs["pixel_values_videos"].shape[:2]
        stride, (height, width) = model.config.spatial_pool_stride, self.tile(model, call)
        return [TokenLayout.frames_of(frames, height // stride, width // stride)] * videos

    def in_units(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        if call.modality == "image":
            return super().in_units(model, call, rows)
        return in_blocks(rows, self.tile(model, call), model.config.spatial_pool_stride)
