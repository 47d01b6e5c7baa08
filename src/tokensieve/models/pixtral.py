"""Pixtral: LLaVA with a Pixtral encoder of packed patches (images of any size), one visual token per patch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokensieve.models.family import Family
from tokensieve.models.mistral3 import Mistral3


class Pixtral(Mistral3):
    name = "pixtral"
    title = "Pixtral (LLaVA with a Pixtral tower)"
    model_types = ("llava",)

    def describes(self, config: Any) -> bool:
        return super().describes(config) and config.vision_config.model_type == "pixtral"

    def merge(self, model: Any) -> int:
        return 1

    def projector(self, model: Any) -> nn.Module:
        return Family.projector(self, model)

    def project(self, model: Any, rows: Tensor) -> Tensor:
        return Family.project(self, model, rows)
