"""Cross-modal encoders: text and image meet inside the model, and reducers sit where they meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokensieve.methods.base import Stage


@dataclass(frozen=True)
class FusionFamily:
    """One kind of cross-modal encoder; how it is hooked lies in ``tokensieve.fusion``."""

    name: str
    title: str
    model_types: tuple[str, ...]
    stages: tuple[Stage, ...] = ("fusion",)
    modalities: tuple[str, ...] = ("image",)
    limits: str = ""


def fusion_families() -> list[FusionFamily]:
    """All cross-modal encoders that Tokensieve knows."""
    return [
        FusionFamily("vilt", "ViLT: answers, pairs of images, retrieval", ("vilt",)),
        FusionFamily("meter", "METER (tokensieve.fusion.meter): the same", ("meter",)),
        FusionFamily("bridgetower", "BridgeTower: retrieval", ("bridgetower",)),
    ]


def is_fusion(model: Any) -> bool:
    """Whether a live model is a cross-modal encoder."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return any(kind in family.model_types for family in fusion_families())


def longest_text(config: Any) -> int:
    """Text tokens that a cross-modal encoder has positions for; RoBERTa's begin after its padding index."""
    text = getattr(config, "text_config", None)
    return int(config.max_position_embeddings if text is None else text.max_position_embeddings - 2)
