"""HoloV: share the budget out over windows of the image, by the attention and variety in each."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import local_variance, padded_nonzero, rank_in_group, share_out
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens


@register("holov", paper="arXiv:2510.02912", needs=Needs(cls_attention=-2))
@dataclass(frozen=True)
class HoloV(Method):
    """Keep the patches that [CLS] attends to most in each window of the raster, by a share of the budget per window.

    The share of a window follows the mean over its tokens of attention plus ``variety`` times the variance of their
    cosines to the others of the window (scaled to the window's mean attention).

    Args:
        keep: tokens per image, or a share of them.
        windows: their number (the paper: 16 of LLaVA-1.5's 576 tokens).
        variety: weight of the variance.
        rank: the order inside a window: by "attention", as in the official code, or "holistic", by attention and
            variance, as in the paper.
        overflow: where the share of a window exceeds its tokens, "redistribute" the excess to the other windows, or
            "truncate" it, as the official code does: then fewer tokens than ``keep`` stay.

    Cost: O(N·D) time for one row of attention, O(N²·D / windows) for the variances; O((N / windows)²) extra memory.
    Paper: "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention", NeurIPS 2025.
    Official code: ranks inside a window by attention alone (the default here), and cuts a window's share off at its
    size (``overflow="truncate"``). It feeds zero vectors in the place of the missing tokens; here these places are
    dropped. A redistributed excess changes all shares before they are rounded, so that a token that the official code
    keeps can leave. Its rows stand by window and then by attention, here in raster order; a window of one token weighs
    1,000 times less there.
    """

    keep: Budget = 64
    windows: int = 16
    variety: float = 0.09
    rank: Literal["attention", "holistic"] = "attention"
    overflow: Literal["redistribute", "truncate"] = "redistribute"
    least: ClassVar = {"windows": 1}

    def slots(self, budget: int, grid: tuple[int, int] | None) -> int | None:
        return None if self.overflow == "truncate" else super().slots(budget, grid)

    def reduce(self, image: ConnectorTokens) -> Reduction:
        attention, count = image.cls_attention[-2], min(self.windows, image.total)
        sizes = [image.total // count + (number < image.total % count) for number in range(count)]
        size = torch.tensor(sizes, device=attention.device)
        window = torch.arange(count, device=size.device).repeat_interleave(size).expand_as(attention)  # [B, N]
        scaled, variance = attention * 1e3, local_variance(image.features, sizes)

        def mean(values: Tensor) -> Tensor:
            """Return the mean over each window, at each of its tokens, `[B, N]`."""
            return torch.zeros_like(values[:, :count]).scatter_add(-1, window, values).div(size).gather(-1, window)

        scores = scaled + self.variety * variance * mean(scaled) / (mean(variance) + 1e-6)
        # read at the last token of each window, [B, windows]; a window without a number has no share
        weights = mean(scores)[:, size.cumsum(0) - 1].nan_to_num(0.0, 0.0, 0.0)
        quotas = (share_out if self.overflow == "redistribute" else _truncated)(weights, image.budget, size)
        ranked = attention if self.rank == "attention" else scores
        kept = rank_in_group(ranked, window, count) < quotas.gather(-1, window)
        if self.overflow == "truncate":
            indices, valid = padded_nonzero(kept)
            return image.keep(indices, scores, valid=valid)
        # equally many in every image: a stable sort puts their indices first
        return image.keep(kept.int().argsort(dim=-1, descending=True, stable=True)[:, : image.budget], scores)


def _truncated(weights: Tensor, k: int, sizes: Tensor) -> Tensor:
    """Split ``k`` into whole shares in proportion to ``weights`` `[B, G]`; the excess over a group's size is lost."""
    quotas = (weights / (weights.sum(-1, keepdim=True) + 1e-6) * k).floor().long()
    rank = weights.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # of the groups, by falling weight
    return (quotas + (rank < k - quotas.sum(-1, keepdim=True)).long()).minimum(sizes)
