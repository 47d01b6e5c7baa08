"""Selections: scores or rows in, ascending indices out. Deterministic: ties go to the lower index."""

import torch
from torch import Tensor

from tokensieve.ops.score import CHUNK, gram, normalise, rows_at

NEIGHBOURS = 64  # near neighbours of a token among which its most similar one is looked for first


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest of `[..., N]`, ascending, `[..., k]`."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values


def top_k_per_group(scores: Tensor, k: int, groups: int) -> Tensor:
    """Indices of the largest in each of ``groups`` consecutive stretches of `[..., N]`, ``k`` in all, ascending."""
    total, groups = scores.shape[-1], min(groups, k)
    bounds = [total * g // groups for g in range(groups + 1)]
    quotas = [k * (g + 1) // groups - k * g // groups for g in range(groups)]
    chosen = [
        top_k(scores[..., start:end], quota) + start
        for start, end, quota in zip(bounds[:-1], bounds[1:], quotas, strict=True)
    ]
    return torch.cat(chosen, -1)


def uniform(total: int, k: int, device: torch.device | None = None) -> Tensor:
    """``k`` of ``total`` indices at equal stride, each in the middle of its stretch, `[k]`."""
    return ((torch.arange(k, device=device) * 2 + 1) * total).div(2 * k, rounding_mode="floor")


def knee(scores: Tensor) -> Tensor:
    """How many of `[..., N]` scores lie before the knee of their descending curve, `[...]` in 1 … N.

    The knee is the point farthest from the chord between the largest and the smallest score.
    """
    curve = scores.float().sort(dim=-1, descending=True).values
    high, low = curve[..., :1], curve[..., -1:]
    heights = (curve - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    along = torch.linspace(0, 1, curve.shape[-1], device=curve.device)
    return (along + heights - 1).abs().argmax(-1) + 1


def padded_nonzero(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where `[..., N]` bool is True, for images that keep different numbers: indices `[..., K]` and which are real.

    K is the largest number. Real indices come first, ascending; padding repeats the last of them. Every image must
    have at least one.
    """
    counts = mask.sum(-1, keepdim=True)
    order = (~mask).int().argsort(dim=-1, stable=True)[..., : int(counts.max())]
    place = torch.arange(order.shape[-1], device=mask.device)
    return order.gather(-1, torch.minimum(place.expand_as(order), counts - 1)), place < counts


def set_true(mask: Tensor, indices: Tensor) -> Tensor:
    """``mask`` `[..., N]` with True at ``indices`` `[..., K]` as well."""
    return mask.scatter(-1, indices, True)


def outliers(scores: Tensor) -> Tensor:
    """Scores above the third quartile by 1.5 interquartile ranges, `[..., N]` bool; the largest where there is none."""
    low, high = torch.quantile(scores.float(), torch.tensor([0.25, 0.75], device=scores.device), dim=-1)
    return set_true(scores > (high + 1.5 * (high - low))[..., None], scores.argmax(-1, keepdim=True))


def spread_evenly(free: Tensor, k: int) -> Tensor:
    """``k`` of the tokens where ``free`` `[..., N]` is True, at equal stride among these, `[..., k]`.

    Every image must have the same number of free tokens, at least ``k``.
    """
    order = (~free).int().argsort(dim=-1, stable=True)
    return order[..., uniform(int(free[(0,) * (free.ndim - 1)].sum()), k, free.device)]


def share_out(weights: Tensor, k: int, sizes: Tensor) -> Tensor:
    """Whole shares of ``k`` in proportion to ``weights`` `[..., G]`, none above its size, that add up to ``k``.

    What a full group cannot take goes to the others in proportion; of the rounded-down shares, those of the largest
    weights are rounded up again.

    Args:
        weights: `[..., G]`, not negative.
        k: at most the sum of the sizes.
        sizes: `[G]` or `[..., G]`, the members of each group.
    """
    weights = weights.double() + torch.finfo(torch.float32).tiny
    full = torch.zeros_like(weights, dtype=torch.bool)
    for _ in range(sizes.shape[-1]):  # each round fills at least one group, or is the last that changes anything
        left = k - (sizes * full).sum(-1, keepdim=True)
        open_weights = weights.masked_fill(full, 0)
        share = left * open_weights / open_weights.sum(-1, keepdim=True).clamp(min=1e-300)
        full = full | (share >= sizes)
    share = share.masked_fill(full, 0).where(~full, sizes.double())
    quotas = (share + 1e-9).long()
    first = weights.masked_fill(quotas >= sizes, -1).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return quotas + (first < k - quotas.sum(-1, keepdim=True)).long()


def rank_in_group(scores: Tensor, group: Tensor, groups: int) -> Tensor:
    """Place of each token among those of its group, by descending score from 0, `[..., N]`.

    Args:
        scores: `[..., N]`.
        group: `[..., N]`, numbers below ``groups``.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, group.gather(-1, order).sort(dim=-1, stable=True).indices)
    size = torch.zeros((*group.shape[:-1], groups), dtype=torch.int64, device=group.device)
    size = size.scatter_add(-1, group, torch.ones_like(group))
    start = (size.cumsum(-1) - size).gather(-1, group)
    return order.argsort(-1) - start


@torch.no_grad()
def bipartite_thinning(rows: Tensor, order: Tensor, k: int, step: int) -> Tensor:
    """Drop duplicates from ``order`` `[..., R]` until ``k`` are left (VisPruner), `[..., k]`.

    In turn: of the entries at even places, the ``step`` that are most similar to one at an odd place leave; the other
    even ones, by descending similarity, and then the odd ones are the new order. Each token looks for its most similar
    one among a few near neighbours, found anew whenever half of the tokens have left; should any token find none there,
    the rounds since are taken back and done with more neighbours. O(R²·D) time, O(R) extra memory beyond a chunk.

    Args:
        rows: `[..., N, D]`.
        order: indices into the rows.
    """
    rows, few = normalise(rows), NEIGHBOURS
    while order.shape[-1] > k:
        left = order.shape[-1]
        few = left if left <= CHUNK and rows.device.type != "cpu" else min(few, left)
        cosine, near = _nearest(rows_at(rows, order), few)
        place, found = torch.arange(left, device=order.device).expand_as(order), None
        while place.shape[-1] > max(k, left // 2 if few < left else 0):
            even, odd = place[..., ::2], place[..., 1::2]
            is_odd = set_true(torch.zeros_like(order, dtype=torch.bool), odd)
            met = is_odd.gather(-1, rows_at(near, even).flatten(-2)).view(*even.shape, few)
            alike = rows_at(cosine, even).masked_fill(~met, -torch.inf).amax(-1)
            found = alike.amin() if found is None else torch.minimum(found, alike.amin())
            even = even.gather(-1, alike.sort(dim=-1, descending=True, stable=True).indices)
            place = torch.cat([even[..., min(step, place.shape[-1] - k) :], odd], -1)
        if few < left and found is not None and bool(found.isinf()):
            few *= 2
        else:
            order = order.gather(-1, place)
    return order


def _nearest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest cosines of each unit row to any row, and whose they are, both `[..., N, k]`, in any order."""
    if rows.shape[-2] <= CHUNK:
        found = gram(rows).topk(k, sorted=False)
        return found.values, found.indices
    parts = [(part @ rows.transpose(-1, -2)).topk(k, sorted=False) for part in torch.split(rows, CHUNK, dim=-2)]
    return torch.cat([part.values for part in parts], -2), torch.cat([part.indices for part in parts], -2)
