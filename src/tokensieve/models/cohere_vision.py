"""Aya Vision and Cohere2 Vision: SigLIP tiles with marker tokens between them; each tile is one image here."""

from __future__ import annotations

from typing import Any

from tokensieve.models.pixel_shuffle import PixelShuffle


class CohereVision(PixelShuffle):
    name = "cohere-vision"
    title = "Aya Vision, Cohere2 Vision"
    model_types = ("aya_vision", "cohere2_vision")
    per_layer_masks = True

    def merge(self, model: Any) -> int:
        return int(model.base_model.multi_modal_projector.downsample_factor)
