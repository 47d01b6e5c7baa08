"""Video-LLaVA: a tower for images, and one for videos, whose frames keep their [CLS] row."""

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

    def entries(self, pooled: Sequence[Tensor], shapes: Sequence[TokenLayout]) -> list[Tensor]:
        if not shapes[0].video:
            return list(pooled)
        return list(torch.split(torch.cat(list(pooled)), shapes[0].total))  # the model returns frame by frame

    def shapes(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        if call.modality == "image":
            return super().shapes(model, call)
        videos, frames = call.inputs["pixel_values_videos"].shape[:2]
        height, width = self.tile(model, call)
        line = torch.arange(frames).repeat_interleave(1 + height * width)
        places = (torch.arange(len(line)) % (1 + height * width)).nonzero().squeeze(-1)  # [CLS] comes first
        views = ((height, width),) * frames
        return [TokenLayout(len(line), views, line=line, places=places, video=True)] * videos

    def patches(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        return super().patches(model, call, rows if call.modality == "image" else rows[:, 1:])
