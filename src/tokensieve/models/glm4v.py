"""GLM-4V: packed patches as in Qwen-VL, merged 2x2 by a convolution before the projector."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokensieve.models.family import EncodeCall
from tokensieve.models.qwen_vl import QwenVL


class Glm4v(QwenVL):
    name = "glm4v"
    title = "GLM-4V"
    model_types = ("glm4v",)
    stages = ("connector", "decoder")
    modalities = ("image",)  # its videos appear in the prompt as images
    takes_subsets = False

    def patches(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        return rows

    def project(self, model: Any, rows: Tensor) -> Tensor:
        merged: Tensor = self.projector(model)(rows)
        return merged
