"""HiPrune: keep patches that a middle layer attends to, their neighbours, and those that a deep layer attends to."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import set_true, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens

NEEDS = Needs(attention_received=(0.35, -2), grid=True)
DOWN, RIGHT = (0, 0, 0, -1, 1), (0, -1, 1, 0, 0)  # an anchor, and the steps from it to its four neighbours


@register("hiprune", paper="arXiv:2508.00553", needs=NEEDS)
@dataclass(frozen=True)
class HiPrune(Method):
    """Keep a few anchors with their neighbours, and then the patches that receive most attention in a deep layer.

    Anchors are the patches that receive most attention in a middle layer of the vision encoder, where attention lies on
    objects. Each brings its four neighbours on the grid. The rest of the budget goes by attention received in the layer
    that the features come from.

    Args:
        keep: tokens per image, or a share of them (the paper: 192, 128 and 64 of 576).
        alpha: share of the budget for anchors and neighbours; a fifth of it, rounded, is the number of anchors.
        layer: the middle layer, from 0; a float is a share of the depth (the paper: the 9th of LLaVA-1.5's 24 layers,
            the 16th of Qwen2.5-VL's 32).
        official_borders: neighbours by place in the raster, as in the official code: the last patch of a row is beside
            the first of the next, and the first or last patch of the image stands for a neighbour outside of it.

    Cost: O(N²·D) time for all rows of attention in two layers; O(N·min(N, 1,024)) extra memory per head.
    Paper: "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models", 2025.
    Official code: takes neighbours as ``official_borders=True`` does, and renumbers positions
    (``positions="contiguous"``).
    """

    keep: Budget = 64
    alpha: float = 0.1
    layer: int | float = 0.35
    official_borders: bool = False
    proportions: ClassVar = ("alpha",)

    @property
    def needs(self) -> Needs:
        return replace(NEEDS, attention_received=(self.layer, -2))

    def reduce(self, image: ConnectorTokens) -> Reduction:
        if image.grid is None:
            raise Refusal(f"{self.info.name} needs tokens on a grid; these {image.total} tokens have none")
        middle, deep = image.attention_received[self.layer], image.attention_received[-2]
        anchors = top_k(middle, round(image.budget * self.alpha / 5))
        none = torch.zeros_like(deep, dtype=torch.bool)
        beside = set_true(none, self.with_neighbours(anchors, *image.grid))
        # attention is at most 1, so neighbours rank before all others and anchors before their neighbours
        return image.keep(top_k(deep + 2 * beside + 2 * set_true(none, anchors), image.budget), deep)

    def with_neighbours(self, anchors: Tensor, height: int, width: int) -> Tensor:
        """Return the anchors `[B, A]` and their neighbours, `[B, 5·A]`."""
        row = anchors[..., None] // width + torch.tensor(DOWN, device=anchors.device)
        column = anchors[..., None] % width + torch.tensor(RIGHT, device=anchors.device)
        place = row * width + column
        if self.official_borders:
            return place.clamp(0, height * width - 1).flatten(1)
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        return place.where(inside, anchors[..., None]).flatten(1)
