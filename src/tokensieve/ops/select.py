"""Selections: scores or rows in, ascending indices out. Deterministic: ties go to the lower index."""

import torch
from torch import Tensor

from tokensieve.ops.score import normalise

CHUNK = 1024  # rows of a similarity matrix held at once, so that no [N, N] matrix is ever made


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


def max_min(rows: Tensor, k: int) -> Tensor:
    """Greedy max–min diversity under cosine distance, in the order of selection, `[..., k]`.

    Starts at the row farthest from its nearest neighbour, then adds the row farthest from everything selected.
    O(K·N·D) time after the start and O(N) extra memory: a running minimum, never a distance matrix.

    Args:
        rows: `[..., N, D]`.
    """
    rows = normalise(rows)
    first = _nearest_distance(rows).argmax(-1)
    chosen, distance = [first], None
    for _ in range(k - 1):
        to_last = 1 - (rows @ _row(rows, chosen[-1])[..., None]).squeeze(-1)
        distance = to_last if distance is None else torch.minimum(distance, to_last)
        # a selected row is at distance 0 up to rounding: rule it out, so that duplicates cannot pick it again
        distance = distance.scatter(-1, chosen[-1][..., None], -torch.inf)
        chosen.append(distance.argmax(-1))
    return torch.stack(chosen, -1)


def _row(rows: Tensor, index: Tensor) -> Tensor:
    """`[..., N, D]` and `[...]` to `[..., D]`."""
    return rows.take_along_dim(index[..., None, None], dim=-2).squeeze(-2)


def _nearest_distance(rows: Tensor) -> Tensor:
    """Distance of each unit row to its nearest other row, `[..., N]`."""
    n, nearest = rows.shape[-2], []
    for start in range(0, n, CHUNK):
        cosines = rows[..., start : start + CHUNK, :] @ rows.transpose(-1, -2)
        own = torch.arange(start, min(start + CHUNK, n), device=rows.device)
        cosines[..., own - start, own] = -torch.inf
        nearest.append(1 - cosines.amax(-1))
    return torch.cat(nearest, -1)
