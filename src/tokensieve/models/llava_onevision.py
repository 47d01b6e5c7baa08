"""LLaVA-OneVision: tiles of any resolution for a single image, only the base tile for each of several images.

Frames of a video are interpolated to half their height and width after the projector. One newline ends the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokensieve.errors import Refusal
from tokensieve.models.any_resolution import AnyResolution
from tokensieve.models.family import EncodeCall
from tokensieve.models.layout import TokenLayout


class LlavaOnevision(AnyResolution):
    name = "llava-onevision"
    title = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    modalities = ("image", "video")

    def layouts(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        if call.modality == "image":
            return super().layouts(model, call)
        videos, frames = call.inputs["pixel_values_videos"].shape[:2]
        height, width = (-(-side // 2) for side in self.tile(model, call))
        layout = TokenLayout.frames_of(frames, height, width)
        patch_index = torch.arange(layout.total)
        line = torch.zeros(layout.total + 1, dtype=torch.int64)  # one line for the whole video: its newline is kept
        return [replace(layout, total=len(line), line=line, patch_index=patch_index)] * videos

    def to_units(self, model: Any, call: EncodeCall, reads: Sequence[Tensor]) -> Tensor:
        if call.modality == "image":
            return super().to_units(model, call, reads)
        rows = torch.cat(list(reads))[:, int(self.has_cls(self.tower(model))) :]
        # the model pools features [b, P, C]: any trailing dimensions of the rows stand in for C
        pooled: Tensor = model.base_model.apply_pooling(rows.flatten(2).float() if rows.ndim > 2 else rows[..., None])
        return pooled.flatten(0, 1).view(-1, *rows.shape[2:])

    def patches(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        if call.modality == "video":
            raise Refusal("LLaVA-OneVision pools videos after its projector, so no row before it belongs to one token")
        return super().patches(model, call, rows)

    def tiles(self, model: Any, call: EncodeCall) -> list[int]:
        tiles, counts = super().tiles(model, call), call.inputs.get("batch_num_images")
        single = [True] * len(tiles) if counts is None else [n == 1 for n in counts.tolist() for _ in range(n)]
        return [count if is_single else 1 for count, is_single in zip(tiles, single, strict=True)]

    def pack(self, model: Any, call: EncodeCall, rows: list[Tensor], newline: Tensor) -> list[Tensor]:
        ratio = call.inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        packed, _ = model.base_model.pack_image_features(rows, call.sizes, newline, vision_aspect_ratio=ratio)
        return list(packed)
