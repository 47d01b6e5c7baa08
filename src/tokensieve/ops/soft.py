"""A top-K with gradients: factors in (0, 1) that sum to K."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BISECTIONS = 64


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int) -> Tensor:
        # sigmoid(±10) of the extreme scores: all factors are near 0 at one end, and near 1 at the other
        low, high = -scores.amax(-1, keepdim=True) - 10, -scores.amin(-1, keepdim=True) + 10
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            small = (scores + middle).sigmoid().sum(-1, keepdim=True) < k
            low, high = middle.where(small, low), high.where(small, middle)
        soft = (scores + (low + high) / 2).sigmoid()
        ctx.save_for_backward(soft)
        return soft

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (soft,) = ctx.saved_tensors
        slope = soft * (1 - soft)
        # the shift follows the scores, so that the sum stays K
        mean = (slope * gradient).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
        return slope * (gradient - mean), None


def soft_top_k(scores: Tensor, k: int) -> Tensor:
    """Return sigmoid(scores + t) `[..., N]`, with the t for which each row sums to ``k``, 0 < k < N."""
    soft: Tensor = _SoftTopK.apply(scores, k)  # type: ignore[no-untyped-call]
    return soft
