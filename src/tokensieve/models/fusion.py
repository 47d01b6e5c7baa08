"""Cross-modal encoders: text and image meet inside the model, and reducers sit where they meet."""

from __future__ import annotations

from dataclasses import dataclass

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
