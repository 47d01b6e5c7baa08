"""Plain ViT towers, CLIP's and SigLIP's: the same rows `[images, specials + patches, C]` go through all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class VitLayer:
    """One layer: ``x = x + attention(…)``, then ``x + mlp(norm(x))``."""

    layer: nn.Module
    attention: nn.Module
    norm: nn.Module
    mlp: nn.Module


def vit_layers(tower: Any) -> list[VitLayer]:
    """The layers of a CLIP or SigLIP tower, first to last."""
    return [VitLayer(layer, layer.self_attn, layer.layer_norm2, layer.mlp) for layer in tower.encoder.layers]


def layers_used(tower: Any, features: int | list[int]) -> int:
    """How many layers of the tower the features depend on.

    Args:
        features: which of the hidden states they are, of which there is one before the first layer.
    """
    wanted = [features] if isinstance(features, int) else features
    states = len(tower.encoder.layers) + 1
    return max(index % states for index in wanted)


def pooling_head(tower: Any, rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Query `[B, H, 1, d]` and keys `[B, H, n, d]` of SigLIP's pooling head; ``None`` if the tower uses none.

    Args:
        rows: `[B, n, C]`, what the tower puts out (after its last norm).
    """
    if not getattr(tower, "use_head", False):
        return None
    probe, attention = tower.head.probe, tower.head.attention
    weight, bias = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)

    def heads(x: Tensor, which: int) -> Tensor:
        projected = nn.functional.linear(x, weight[which], bias[which])
        return projected.view(*projected.shape[:2], attention.num_heads, -1).transpose(1, 2)

    return heads(probe, 0).expand(len(rows), -1, -1, -1), heads(rows, 1)
