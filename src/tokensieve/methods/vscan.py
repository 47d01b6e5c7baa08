"""VScan: keep patches that [CLS] attends to early in each window, and late in the whole image; merge the others."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import nearest, rank_in_group, rows_at, sizes_of, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens

NEEDS = Needs(cls_attention=(0.2, -2), grid=True)


@register("vscan", paper="arXiv:2505.22654", needs=NEEDS)
@dataclass(frozen=True)
class VScan(Method):
    """Spend half of the budget on windows of the image and half on the whole of it, and merge the other patches.

    Each square window keeps the same number of patches, those that [CLS] attends to most in an early layer. The rest of
    the budget goes to the patches that it attends to most in the layer that the features come from. Each other
    patch is averaged into the kept one of highest cosine (of the projector's rows).

    Args:
        keep: tokens per image, or a share of them (the paper: 96 of 576 before the LLM, 64 on average).
        local: share of the budget that goes to the windows, rounded down to equally many patches of each.
        window: height and width of a window, in tokens; those at the right and lower border may be smaller.
        layer: the early layer, from 0; a float is a share of the depth (the official code: layer 5 of LLaVA-1.5's 24).

    Cost: O(N·D) time for two rows of attention, O(K·N·D) to merge; O(N·min(K, 1,024)) extra memory.
    Paper: "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models", TMLR 2026. Its stage
    inside the LLM is ``pyramiddrop`` at one layer: ``vscan(keep=96) + pyramiddrop(layers=(0.5,), keep=32)``, where a
    share is of the tokens that entered the LLM.
    Official code: takes 24×24 tokens only, leaves over the budget that does not divide by the windows, and renumbers
    positions (``positions="contiguous"``).
    """

    keep: Budget = 64
    local: float = 0.5
    window: int = 6
    layer: int | float = 0.2
    proportions: ClassVar = ("local",)
    least: ClassVar = {"window": 1}

    @property
    def needs(self) -> Needs:
        return replace(NEEDS, cls_attention=(self.layer, -2))

    def reduce(self, image: ConnectorTokens) -> Reduction:
        if image.grid is None:
            raise Refusal(f"{self.info.name} needs tokens on a grid; these {image.total} tokens have none")
        early, late = image.cls_attention[self.layer], image.cls_attention[-2]
        height, width = image.grid
        across, down = -(-width // self.window), -(-height // self.window)
        token = torch.arange(image.total, device=late.device).expand_as(late)
        window_of = token // width // self.window * across + token % width // self.window
        each = int(image.budget * self.local) // (across * down)
        in_windows = rank_in_group(early, window_of, across * down) < each
        kept = top_k(late + 2 * in_windows, image.budget)  # attention is at most 1: the patches of windows rank first
        slot = nearest(image.features, rows_at(image.features, kept)).squeeze(-1)
        slot = slot.scatter(1, kept, token[:, : image.budget])  # also where two kept patches have equal rows
        return image.merge(kept, slot, token, 1 / sizes_of(slot, image.budget).gather(1, slot), scores=late)
