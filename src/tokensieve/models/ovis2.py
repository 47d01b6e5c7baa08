"""Ovis2: each visual token is a mixture over a visual vocabulary; indicator tokens separate the tiles."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokensieve.errors import Refusal
from tokensieve.models.family import Family


class Ovis2(Family):
    name = "ovis2"
    title = "Ovis2"
    model_types = ("ovis2",)

    def merge(self, model: Any) -> int:
        return int(model.config.vision_config.hidden_stride)

    def projector(self, model: Any) -> nn.Module:
        raise Refusal(f"{self.title} has no projector: its tokens are mixtures of a visual vocabulary")
