"""Selections: scores or rows in, ascending indices out. Ties go to the lower index."""

import torch
from torch import Tensor

from tokensieve.ops.score import CHUNK, gram, normalise, rows_at

NEIGHBOURS = 64  # near neighbours of a token that are searched first for its most similar one


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the ``k`` largest of `[..., N]`, ascending, `[..., k]`."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values


def top_k_per_group(scores: Tensor, k: int, groups: int) -> Tensor:
    """Return the indices of the ``k`` largest of `[..., N]`, equally many from each window, ascending, `[..., k]`.

    The windows are ``groups`` consecutive parts of nearly equal length.
    """
    total, groups = scores.shape[-1], min(groups, k)
    bounds = [total * g // groups for g in range(groups + 1)]
    quotas = [k * (g + 1) // groups - k * g // groups for g in range(groups)]
    chosen = [
        top_k(scores[..., start:end], quota) + start
        for start, end, quota in zip(bounds[:-1], bounds[1:], quotas, strict=True)
    ]
    return torch.cat(chosen, -1)


def uniform(total: int, k: int, device: torch.device | None = None) -> Tensor:
    """Return ``k`` of ``total`` indices at equal stride, each in the middle of its window, `[k]`."""
    return ((torch.arange(k, device=device) * 2 + 1) * total).div(2 * k, rounding_mode="floor")


def knee(scores: Tensor) -> Tensor:
    """Count the scores `[..., N]` before the knee of their descending curve, `[...]` in 1 … N.

    The knee is the point farthest from the chord between the largest and the smallest score.
    """
    curve = scores.float().sort(dim=-1, descending=True).values
    high, low = curve[..., :1], curve[..., -1:]
    heights = (curve - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    # both axes scaled to [0, 1], the chord is x + y = 1: |x + y − 1| grows with the distance to it
    positions = torch.linspace(0, 1, curve.shape[-1], device=curve.device)
    return (positions + heights - 1).abs().argmax(-1) + 1


def padded_nonzero(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of True in a mask `[..., N]`, `[..., K]`, and the mask of valid ones, `[..., K]`.

    K is the largest number of True in an image. Valid indices come first, ascending; padding repeats the last of them.
    Every image must have at least one True.
    """
    counts = mask.sum(-1, keepdim=True)
    order = (~mask).int().argsort(dim=-1, stable=True)[..., : int(counts.max())]  # True sorts first, ascending
    column = torch.arange(order.shape[-1], device=mask.device)
    return order.gather(-1, torch.minimum(column.expand_as(order), counts - 1)), column < counts


def set_true(mask: Tensor, indices: Tensor) -> Tensor:
    """Set a mask `[..., N]` to True at ``indices`` `[..., K]`, in a copy."""
    return mask.scatter(-1, indices, True)


def outliers(scores: Tensor) -> Tensor:
    """Mark the scores `[..., N]` above the third quartile by 1.5 interquartile ranges, and always the largest score."""
    low, high = torch.quantile(scores.float(), torch.tensor([0.25, 0.75], device=scores.device), dim=-1)
    return set_true(scores > (high + 1.5 * (high - low))[..., None], scores.argmax(-1, keepdim=True))


def spread_evenly(free: Tensor, k: int) -> Tensor:
    """Select ``k`` of the tokens where ``free`` `[..., N]` is True, at equal stride among them, `[..., k]`.

    Every image must have the same number of free tokens, at least ``k``.
    """
    order = (~free).int().argsort(dim=-1, stable=True)
    # all images have the same number of free tokens: the first image gives it
    return order[..., uniform(int(free[(0,) * (free.ndim - 1)].sum()), k, free.device)]


def share_out(weights: Tensor, k: int, sizes: Tensor) -> Tensor:
    """Split ``k`` into whole shares in proportion to ``weights``, none above its group's size, `[..., G]`.

    The excess of a full group goes to the others in proportion. Shares are rounded down; the groups with the largest
    weights then get one more each until the shares add up to ``k``.

    Args:
        weights: `[..., G]`, not negative.
        k: at most the sum of the sizes.
        sizes: `[G]` or `[..., G]`, the members of each group.
    """
    weights = weights.double() + torch.finfo(torch.float32).tiny
    full = torch.zeros_like(weights, dtype=torch.bool)
    for _ in range(sizes.shape[-1]):  # a round that fills no group changes nothing: G rounds are enough, without a sync
        remaining = k - (sizes * full).sum(-1, keepdim=True)
        open_weights = weights.masked_fill(full, 0)
        share = remaining * open_weights / open_weights.sum(-1, keepdim=True).clamp(min=1e-300)
        full = full | (share >= sizes)
    share = share.masked_fill(full, 0).where(~full, sizes.double())
    quotas = (share + 1e-9).long()  # a share that rounding put just below a whole number counts as that number
    rank = weights.masked_fill(quotas >= sizes, -1).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return quotas + (rank < k - quotas.sum(-1, keepdim=True)).long()


def rank_in_group(scores: Tensor, group: Tensor, groups: int) -> Tensor:
    """Rank each token within its group by descending score, from 0, `[..., N]`.

    Args:
        scores: `[..., N]`.
        group: `[..., N]`, numbers below ``groups``.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    # a stable sort by group keeps the order of scores within each group
    order = order.gather(-1, group.gather(-1, order).sort(dim=-1, stable=True).indices)
    size = torch.zeros((*group.shape[:-1], groups), dtype=torch.int64, device=group.device)
    size = size.scatter_add(-1, group, torch.ones_like(group))
    start = (size.cumsum(-1) - size).gather(-1, group)
    return order.argsort(-1) - start  # argsort inverts the order: the place of each token, less its group's first


@torch.no_grad()
def bipartite_thinning(rows: Tensor, order: Tensor, k: int, step: int) -> Tensor:
    """Drop duplicates from ``order`` `[..., R]` until ``k`` are left (VisPruner), `[..., k]`.

    Each round drops the ``step`` entries at even places that are most similar to an entry at an odd place. The new
    order is the other even entries by descending similarity, then the odd entries. A token's most similar one is
    searched among a few near neighbours, which are recomputed whenever half of the tokens are dropped. If a token has
    no candidate among them, the rounds since then are repeated with more neighbours. O(R²·D) time, O(R) extra memory
    beyond a chunk.

    Args:
        rows: `[..., N, D]`.
        order: indices into the rows.
    """
    rows, few = normalise(rows), NEIGHBOURS
    while order.shape[-1] > k:
        total = order.shape[-1]
        few = total if total <= CHUNK and rows.device.type != "cpu" else min(few, total)
        cosine, neighbours = _nearest(rows_at(rows, order), few)  # both [..., total, few], as places in this order
        place, lowest = torch.arange(total, device=order.device).expand_as(order), None
        while place.shape[-1] > max(k, total // 2 if few < total else 0):
            even, odd = place[..., ::2], place[..., 1::2]
            is_odd = set_true(torch.zeros_like(order, dtype=torch.bool), odd)
            candidate = is_odd.gather(-1, rows_at(neighbours, even).flatten(-2)).view(*even.shape, few)
            similarity = rows_at(cosine, even).masked_fill(~candidate, -torch.inf).amax(-1)
            lowest = similarity.amin() if lowest is None else torch.minimum(lowest, similarity.amin())
            even = even.gather(-1, similarity.sort(dim=-1, descending=True, stable=True).indices)
            place = torch.cat([even[..., min(step, place.shape[-1] - k) :], odd], -1)
        # one sync for all rounds: −inf means that some token had no odd token among its neighbours
        if few < total and lowest is not None and bool(lowest.isinf()):
            few *= 2
        else:
            order = order.gather(-1, place)
    return order


def _nearest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest cosines of each unit row and the indices of their rows, `[..., N, k]`, unsorted."""
    if rows.shape[-2] <= CHUNK:
        top = gram(rows).topk(k, sorted=False)
        return top.values, top.indices
    parts = [(part @ rows.transpose(-1, -2)).topk(k, sorted=False) for part in torch.split(rows, CHUNK, dim=-2)]
    return torch.cat([part.values for part in parts], -2), torch.cat([part.indices for part in parts], -2)
