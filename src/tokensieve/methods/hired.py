"""HiRED: share the budget out over the tiles of an image, and keep the tokens of each that [CLS] attends to most."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import padded_nonzero, rank_in_group, set_true, share_out, sizes_of, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, Tiles


@register("hired", paper="arXiv:2408.10945", needs=Needs(cls_attention=(0, -2)))
@dataclass(frozen=True)
class Hired(Method):
    """Keep the tokens that [CLS] attends to most in the layer the features come from, tile by tile if there are tiles.

    The whole image gets the share ``alpha`` of the budget. The tiles share the remaining budget by the number of
    salient patches in each: the share 1 − ``alpha`` of patches that [CLS] attends to most in the first layer.

    Args:
        keep: tokens per image, or a share of them.
        alpha: share of the whole image.
        spatial: additional tokens at equal stride over all, as the official code offers for untiled images.
        official_tiles: count salient patches in consecutive windows of the raster and round every share down, as
            the official code does, instead of by the tiles' places and to the full budget.

    Cost: O(N·D) time for two rows of attention, O(N·log N) to sort them; O(N) extra memory.
    Paper: "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models",
    AAAI 2025. The tiles of a mosaic count without the padding that the model takes away.
    Official code: counts salient patches and rounds as ``official_tiles=True`` does, and renumbers positions
    (``positions="contiguous"``).
    """

    keep: Budget = 0.2
    alpha: float = 0.5
    spatial: int = 0
    official_tiles: bool = False
    proportions: ClassVar = ("alpha",)

    def slots(self, budget: int, grid: tuple[int, int] | None) -> int | None:
        exact = not self.official_tiles and not self.spatial
        return super().slots(budget, grid) if exact else None

    def reduce(self, image: ConnectorTokens) -> Reduction:
        scores = image.cls_attention[-2]
        if image.tiles is not None:
            return self.reduce_tiles(image, image.tiles, scores)
        best = top_k(scores, image.budget)
        if not self.spatial:
            return image.keep(best, scores)
        kept = set_true(torch.zeros_like(scores, dtype=torch.bool), best)
        kept[:, : -1 : max(1, image.total // self.spatial)] = True
        # images whose best tokens lie on the stride keep fewer in all: their rows are padded
        indices, valid = padded_nonzero(kept)
        return image.keep(indices, scores, valid=valid)

    def reduce_tiles(self, image: ConnectorTokens, tiles: Tiles, scores: Tensor) -> Reduction:
        """Keep the best tokens of the whole image and of each tile, by their quotas."""
        (height, width), (rows, columns) = tiles.views
        size, tile, count, budget = height * width, tiles.number, tiles.count, image.budget
        salient = top_k(image.cls_attention[0][:, :size], int(size * (1 - self.alpha)))
        if self.official_tiles:
            salient_of = sizes_of(salient * count // size, count)
        else:  # a patch of the whole image lies at the same share of height and width in the mosaic
            place = salient // width * rows // height * columns + salient % width * columns // width
            salient_of = sizes_of(tile[:, size:].gather(-1, place) - 1, count)
        # at least so many that the tiles can take the others, at most all of the whole image
        whole = min(max(int(budget * self.alpha), budget - (image.total - size)), size)
        for_tiles, sizes = budget - whole, sizes_of(tile, 1 + count)[:, 1:]
        if self.official_tiles:
            shares = torch.minimum((salient_of / salient_of.sum(-1, keepdim=True) * for_tiles).long(), sizes)
        else:
            shares = share_out(salient_of, for_tiles, sizes)
        quotas = torch.cat([torch.full_like(shares[:, :1], whole), shares], -1)
        kept, valid = padded_nonzero(rank_in_group(scores, tile, 1 + count) < quotas.gather(-1, tile))
        return image.keep(kept, scores, valid=valid if self.official_tiles else None)
