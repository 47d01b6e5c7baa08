"""Plain ViTs (CLIP, SigLIP): the same rows `[images, specials + patches, C]` pass through all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

Pooling: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class VitLayer:
    """One encoder layer: ``x = x + attention(…)``, then ``x + mlp(norm(x))``."""

    layer: nn.Module
    attention: nn.Module
    norm: nn.Module
    mlp: nn.Module


def vit_layers(tower: Any) -> list[VitLayer]:
    """Return the layers of a CLIP or SigLIP encoder, first to last."""
    return [VitLayer(layer, layer.self_attn, layer.layer_norm2, layer.mlp) for layer in tower.encoder.layers]


def layers_used(tower: Any, features: int | list[int]) -> int:
    """Return the number of encoder layers that the features depend on.

    Args:
        features: indices of the selected hidden states; state 0 is the input of the first layer.
    """
    indices = [features] if isinstance(features, int) else features
    states = len(tower.encoder.layers) + 1
    return max(index % states for index in indices)


def pooling_head(tower: Any) -> Pooling | None:
    """Return SigLIP's pooling head as a map from encoder rows to its query and keys; ``None`` without a head.

    A model does not record whether its head was trained. ``tower.use_head = False`` turns an untrained head off.
    """
    used = getattr(tower.config, "model_type", None) == "siglip_vision_model" and tower.use_head
    return partial(_pooled, tower.head) if used and not tower.head.probe.is_meta else None


def _pooled(head: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the query `[B, H, 1, d]` and the keys `[B, H, n, d]` of a head that pools `[B, n, C]`."""
    # torch's MultiheadAttention stores the three projections as one: query, key, value
    weight, bias = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)

    def heads(x: Tensor, part: int) -> Tensor:
        projected = nn.functional.linear(x, weight[part], bias[part])
        return projected.view(*projected.shape[:2], head.attention.num_heads, -1).transpose(1, 2)

    return heads(head.probe, 0).expand(len(rows), -1, -1, -1), heads(rows, 1)
