"""Video-LLaVA: one vision encoder for images and one for videos, whose frames keep their [CLS] row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.models.family import EncodeCall, Family
from tokensieve.models.layout import TokenLayout


class VideoLlava(Family):
    name = "video-llava"
    title = "Video-LLaVA"
    model_types = ("video_llava",)
    modalities = ("image", "video")

    def towers(self, model: Any) -> list[nn.Module]:
        return [self.tower(model), model.base_model.video_tower]

    def features_per_image(self, pooled: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        if not layouts[0].video:
            return list(pooled)
        return list(torch.split(torch.cat(list(pooled)), layouts[0].total))  # the model returns one entry per frame

    def layouts(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        if call.modality == "image":
            return super().layouts(model, call)
        videos, frames = call.inputs["pixel_values_videos"].shape[:2]
        height, width = self.tile(model, call)
        line = torch.arange(frames).repeat_interleave(1 + height * width)
        patch_index = (torch.arange(len(line)) % (1 + height * width)).nonzero().squeeze(-1)  # row 0 is [CLS]
        views = ((height, width),) * frames
        return [TokenLayout(len(line), views, line=line, patch_index=patch_index, video=True)] * videos

    def patches(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        return super().patches(model, call, rows if call.modality == "image" else rows[:, 1:])
