"""HoloV: share the budget out over windows of the image, by the attention and variety in each."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import local_variance, rank_in_group, share_out
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

    Cost: O(N·D) time for one row of attention, O(N²·D / windows) for the variances; O((N / windows)²) extra memory.
    Paper: "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention", NeurIPS 2025.
    Official code: ranks inside a window by attention alone (the default here). It fills with zeros or cuts off the
    excess share of a full window; here the excess goes to the other windows.
    """

    keep: Budget = 64
    windows: int = 16
    variety: float = 0.09
    rank: Literal["attention", "holistic"] = "attention"
    least: ClassVar = {"windows": 1}

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
        weights = mean(scores)[:, size.cumsum(0) - 1]  # read at the last token of each window, [B, windows]
        quotas = share_out(weights, image.budget, size)
        ranked = attention if self.rank == "attention" else scores
        kept = rank_in_group(ranked, window, count) < quotas.gather(-1, window)
        # equally many in every image: a stable sort puts their indices first
        return image.keep(kept.int().argsort(dim=-1, descending=True, stable=True)[:, : image.budget], scores)
