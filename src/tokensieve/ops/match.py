"""Bipartite soft matching: which tokens go into which, without clustering and without iteration."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokensieve.ops.score import normalise


def keep_best(scores: Tensor, keep: Sequence[int], *, in_place: bool = True) -> tuple[Tensor, Tensor]:
    """The ``keep[b]`` best tokens of each row, a different number per row if need be.

    Args:
        scores: `[B, N]`; −inf on padding.
        keep: tokens to keep of each row, at least 1.
        in_place: survivors stand in the order they had; else best first.

    Returns:
        indices `[B, K]` and which of them count `[B, K]` (bool), with K the largest of ``keep``.
    """
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, : max(keep)]
    real = first_of_each(keep, best)
    if in_place:
        best = best.masked_fill(~real, scores.shape[-1]).sort(-1).values.clamp(max=scores.shape[-1] - 1)
    return best, real


def bipartite_match(metric: Tensor, merges: Sequence[int], real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pair alternate tokens by cosine and choose the ``merges[b]`` most similar pairs of each row.

    Even positions propose to the odd position they resemble most; the best proposals win. Position 0 is protected.
    Several tokens may go into the same one.

    Args:
        metric: `[B, N, D]`, what similarity is measured on.
        merges: pairs to merge in each row; at most (n − 1) // 2 of n real tokens.
        real: `[B, N]` bool, padding last in each row.

    Returns:
        source and target positions `[B, R]`, and which of these pairs count `[B, R]` (bool).

    Paper: Bolya et al., "Token Merging: Your ViT But Faster", 2023.
    """
    unit = normalise(metric)
    cosines = unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)
    cosines = cosines.masked_fill(~real[:, None, 1::2] | ~real[:, ::2, None], -torch.inf)
    cosines[:, 0] = -torch.inf
    similarity, partner = cosines.max(-1)
    proposer = similarity.sort(dim=-1, descending=True, stable=True).indices[:, : max(merges)]
    return 2 * proposer, 2 * partner.gather(-1, proposer) + 1, first_of_each(merges, proposer)


def alternate_match(metric: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Every second token, from the ``first`` on, most similar to one of the others first; and which one that is.

    Args:
        metric: `[B, N, D]`, what similarity (the cosine) is measured on.
        first: 0 or 1.

    Returns:
        tokens `[B, A]` and their partners `[B, A]`; several tokens may have the same one.
    """
    unit = normalise(metric)
    similarity, partner = (unit[:, first::2] @ unit[:, 1 - first :: 2].transpose(-1, -2)).max(-1)
    order = similarity.sort(dim=-1, descending=True, stable=True).indices
    return 2 * order + first, 2 * partner.gather(-1, order) + 1 - first


def first_of_each(counts: Sequence[int], like: Tensor) -> Tensor:
    """True on the first ``counts[b]`` columns of row b, in the shape `[B, N]` of ``like``."""
    column = torch.arange(like.shape[1], device=like.device)
    if min(counts) == max(counts):  # nothing to copy to the device
        return (column < counts[0]).expand(len(counts), -1)
    return column < torch.tensor(counts, device=like.device)[:, None]
