"""HoloV: every part of the image keeps a share, the larger the more attention and variety it holds."""

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
    """Share the budget out over stretches of the raster, and keep the patches of each that [CLS] attends to most.

    A stretch gets its share by the mean over its tokens of attention plus ``variety`` times the variance of their
    cosines to the others of the stretch (scaled to the stretch's mean attention).

    Args:
        keep: tokens per image, or a share of them.
        windows: how many (the paper: 16 of LLaVA-1.5's 576 tokens).
        variety: weight of the variance.
        rank: what counts inside a stretch: "attention", as in the official code, or "holistic", both, as in the paper.

    Cost: O(N·D) time for one row of attention, O(N²·D / stretches) for the variances; O((N / stretches)²) extra memory.
    Paper: "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention", NeurIPS 2025.
    Official code: ranks inside a stretch by attention alone (the default here), and fills with zeros or cuts off what a
    full stretch cannot take; here it goes to the others.
    """

    keep: Budget = 64
    windows: int = 16
    variety: float = 0.09
    rank: Literal["attention", "holistic"] = "attention"
    least: ClassVar = {"windows": 1}

    def reduce(self, image: ConnectorTokens) -> Reduction:
        attention, wanted, parts = image.cls_attention[-2], image.budget, self.windows
        parts = min(parts, image.total)
        sizes = [image.total // parts + (part < image.total % parts) for part in range(parts)]
        size = torch.tensor(sizes, device=attention.device)
        group = torch.arange(parts, device=size.device).repeat_interleave(size).expand_as(attention)
        scaled, variance = attention * 1e3, local_variance(image.features, sizes)

        def mean(values: Tensor) -> Tensor:  # over each stretch, at each of its tokens
            return torch.zeros_like(values[:, :parts]).scatter_add(-1, group, values).div(size).gather(-1, group)

        scores = scaled + self.variety * variance * mean(scaled) / (mean(variance) + 1e-6)
        weights = mean(scores)[:, size.cumsum(0) - 1]
        quotas = share_out(weights, wanted, size)
        ranked = attention if self.rank == "attention" else scores
        ahead = rank_in_group(ranked, group, parts) < quotas.gather(-1, group)
        return image.keep(ahead.int().argsort(dim=-1, descending=True, stable=True)[:, :wanted], scores)
