"""HiRED: the whole image tells which tiles deserve tokens, and [CLS] attention which tokens of a tile."""

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
    """Keep what [CLS] attends to most in the layer the features come from, tile by tile where there are tiles.

    The whole image gets the share ``alpha`` of the budget; each tile one of the rest, by how many of the patches that
    the first layer's [CLS] attends to most (a share of 1 − ``alpha``) lie in it.

    Args:
        keep: tokens per image, or a share of them.
        alpha: share of the whole image.
        spatial: besides, tokens at equal stride over all, as the official code offers for untiled images.
        official_tiles: count salient patches in consecutive stretches of the raster and round every share down, as
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

    def reduce(self, image: ConnectorTokens) -> Reduction:
        scores, wanted = image.cls_attention[-2], image.budget
        if image.tiles is not None:
            return self.tiled(image, image.tiles, scores, wanted)
        kept = top_k(scores, wanted)
        if not self.spatial:
            return image.keep(kept, scores)
        stay = set_true(torch.zeros_like(scores, dtype=torch.bool), kept)
        stay[:, : -1 : max(1, image.total // self.spatial)] = True
        kept, real = padded_nonzero(stay)
        return image.keep(kept, scores, valid=real)

    def tiled(self, image: ConnectorTokens, tiles: Tiles, scores: Tensor, wanted: int) -> Reduction:
        """The best of the whole image and of each tile, by their quotas."""
        (height, width), (rows, columns) = tiles.views
        size, tile, count = height * width, tiles.number, tiles.count
        salient = top_k(image.cls_attention[0][:, :size], int(size * (1 - self.alpha)))
        if self.official_tiles:
            found = sizes_of(salient * count // size, count)
        else:
            mosaic = salient // width * rows // height * columns + salient % width * columns // width
            found = sizes_of(tile[:, size:].gather(-1, mosaic) - 1, count)
        whole = min(max(int(wanted * self.alpha), wanted - (image.total - size)), size)
        rest, sizes = wanted - whole, sizes_of(tile, 1 + count)[:, 1:]
        if self.official_tiles:
            shares = torch.minimum((found / found.sum(-1, keepdim=True) * rest).long(), sizes)
        else:
            shares = share_out(found, rest, sizes)
        quotas = torch.cat([torch.full_like(shares[:, :1], whole), shares], -1)
        kept, real = padded_nonzero(rank_in_group(scores, tile, 1 + count) < quotas.gather(-1, tile))
        return image.keep(kept, scores, valid=real if self.official_tiles else None)
