"""HiRED: the whole image tells which tiles deserve tokens, and [CLS] attention which tokens of a tile."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods.base import Method, Needs
from tokensieve.methods.registry import register
from tokensieve.ops import at, marked, rank_in_group, share_out, sizes_of, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("hired", paper="arXiv:2408.10945", needs=Needs(cls_attention=-2))
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

    Cost: O(N·D) time for one row of attention (two for tiled images), O(N·log N) to sort it; O(N) extra memory.
    Paper: "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models",
    AAAI 2025. Tiled images need the first layer's [CLS] attention as well. An attached model does not hand its tiles
    over yet: the tokens of all of them (LLaVA-NeXT's, say) compete as those of one image.
    Official code: counts salient patches and rounds as ``official_tiles=True`` does, and renumbers positions
    (``positions="contiguous"``).
    """

    keep: Budget = 0.2
    alpha: float = 0.5
    spatial: int = 0
    official_tiles: bool = False

    def reduce(self, image: VisualTokens) -> Reduction:
        scores, wanted = image.at("cls_attention", -2), image.count(self.keep)
        if image.tiles is not None:
            return self.tiled(image, scores, wanted)
        kept = top_k(scores, wanted)
        if not self.spatial:
            return image.keep(kept, scores)
        stay = at(torch.zeros_like(scores, dtype=torch.bool), kept)
        stay[:, : -1 : max(1, image.total // self.spatial)] = True
        kept, real = marked(stay)
        return image.keep(kept, scores, valid=real)

    def tiled(self, image: VisualTokens, scores: Tensor, wanted: int) -> Reduction:
        """The best of the whole image and of each tile, by their quotas."""
        rows, columns = image.tiles or (0, 0)
        size = image.total // (1 + rows * columns)
        salient = top_k(image.at("cls_attention", 0)[:, :size], int(size * (1 - self.alpha)))
        tile = salient * (rows * columns) // size
        if not self.official_tiles:
            side = math.isqrt(size)
            if side * side != size:
                raise ValueError(f"tiles must be square to be found in the whole image; got {size} tokens each")
            tile = salient // side * rows // side * columns + salient % side * columns // side
        found = sizes_of(tile, rows * columns)
        whole = min(int(wanted * self.alpha), size)
        rest = wanted - whole
        if self.official_tiles:
            shares = (found / found.sum(-1, keepdim=True) * rest).long().clamp(max=size)
        else:
            shares = share_out(found, rest, torch.full_like(found[0], size))
        quotas = torch.cat([torch.full_like(shares[:, :1], whole), shares], -1)
        crop = torch.arange(image.total, device=scores.device).expand_as(scores) // size
        stay = rank_in_group(scores, crop, 1 + rows * columns) < quotas.gather(-1, crop)
        kept, real = marked(stay)
        return image.keep(kept, scores, valid=real if self.official_tiles else None)
