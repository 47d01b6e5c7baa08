"""Bipartite soft matching: pairs of tokens to merge, without clustering or iteration."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokensieve.ops.score import normalise


def keep_best(scores: Tensor, keep: Sequence[int], *, in_place: bool = True) -> tuple[Tensor, Tensor]:
    """Keep the ``keep[b]`` best tokens of each row.

    Args:
        scores: `[B, N]`; −inf on padding.
        keep: tokens to keep of each row, at least 1.
        in_place: keep the original order; False sorts the best first.

    Returns:
        indices `[B, K]` with K the largest of ``keep``, and the mask of valid ones `[B, K]` (bool).
    """
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, : max(keep)]
    valid = first_of_each(keep, best)
    if in_place:  # padding sorts behind all tokens, then repeats the last index, which exists
        best = best.masked_fill(~valid, scores.shape[-1]).sort(-1).values.clamp(max=scores.shape[-1] - 1)
    return best, valid


def bipartite_match(metric: Tensor, merges: Sequence[int], valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pair alternate tokens by cosine and choose the ``merges[b]`` most similar pairs of each row.

    Each token at an even position is paired with the most similar token at an odd position; the most similar pairs are
    chosen. Position 0 is protected. Several tokens may merge into the same one.

    Args:
        metric: `[B, N, D]`, the features that similarity is measured on.
        merges: pairs to merge in each row; at most (n − 1) // 2 of n valid tokens, so none of one or two.
        valid: `[B, N]` bool, False on padding, which is last in each row.

    Returns:
        source and target positions `[B, R]`, and the mask of valid pairs `[B, R]` (bool).

    Paper: Bolya et al., "Token Merging: Your ViT But Faster", 2023.
    """
    if not max(merges):  # one token has no partner to search for
        none = torch.zeros((len(metric), 0), dtype=torch.int64, device=metric.device)
        return none, none, none.bool()
    unit = normalise(metric)
    cosines = unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)
    cosines = cosines.masked_fill(~valid[:, None, 1::2] | ~valid[:, ::2, None], -torch.inf)
    cosines[:, 0] = -torch.inf
    similarity, partner = cosines.max(-1)
    even = similarity.sort(dim=-1, descending=True, stable=True).indices[:, : max(merges)]
    # number among the even or the odd tokens to position among all
    return 2 * even, 2 * partner.gather(-1, even) + 1, first_of_each(merges, even)


def alternate_match(metric: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Pair each second token, from ``first`` on, with the most similar other token; the most similar pair comes first.

    Args:
        metric: `[B, N, D]`, the features that similarity (the cosine) is measured on.
        first: 0 or 1.

    Returns:
        tokens `[B, A]` and their partners `[B, A]`; several tokens may have the same partner.
    """
    unit = normalise(metric)
    similarity, partner = (unit[:, first::2] @ unit[:, 1 - first :: 2].transpose(-1, -2)).max(-1)
    order = similarity.sort(dim=-1, descending=True, stable=True).indices
    return 2 * order + first, 2 * partner.gather(-1, order) + 1 - first


def first_of_each(counts: Sequence[int], like: Tensor) -> Tensor:
    """Return a mask with the shape `[B, N]` of ``like``: True on the first ``counts[b]`` columns of row b."""
    column = torch.arange(like.shape[1], device=like.device)
    if min(counts) == max(counts):  # no copy to the device
        return (column < counts[0]).expand(len(counts), -1)
    return column < torch.tensor(counts, device=like.device)[:, None]
