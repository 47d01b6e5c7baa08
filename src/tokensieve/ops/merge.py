"""Merges: who goes into which slot with which weight, as the entries of a sparse matrix."""

import torch
from torch import Tensor

from tokensieve.ops.score import CHUNK, normalise

Grid = tuple[int, int]


def pooled_grid(grid: Grid, k: int) -> Grid:
    """The largest grid of at most ``k`` cells that keeps the shape of ``grid``, e.g. (24, 24), 192 to (13, 14)."""
    height, width = grid

    def room(cells: Grid) -> tuple[int, int]:  # how large a grid of the same shape fits inside, then how many cells
        return min(cells[0] * width, cells[1] * height), cells[0] * cells[1]

    return max(((h, min(width, k // h)) for h in range(1, min(height, k) + 1)), key=room)


def keep_and_average(
    kept: Tensor, sources: Tensor, cluster: Tensor, centres: Tensor, *, appended: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Some tokens as they are, and beside them the means of clusters of others.

    Args:
        kept: `[..., K]` tokens that stay, ascending.
        sources: `[..., S]` tokens that are averaged.
        cluster: `[..., S]`, which of C clusters each of them belongs to.
        centres: `[..., C]`, numbers among the sources: a cluster's mean stands at its centre's place.
        appended: the means stand after the kept tokens instead, in the places that both together take up.

    Returns:
        anchors `[..., K + C]`, slot, source `[..., K + S]` and weight; the weights of a slot sum to 1.
    """
    k = kept.shape[-1]
    anchors, order = torch.cat([kept, sources.gather(-1, centres)], -1).sort(-1)
    slots = torch.arange(order.shape[-1], device=order.device).expand_as(order) if appended else order.argsort(-1)
    sizes = torch.zeros_like(centres).scatter_add(-1, cluster, torch.ones_like(cluster))
    slot = torch.cat([slots[..., :k], slots.gather(-1, cluster + k)], -1)
    weight = torch.cat([torch.ones_like(kept, dtype=torch.float32), 1 / sizes.gather(-1, cluster)], -1)
    return anchors, slot, torch.cat([kept, sources], -1), weight


def area_pool(grid: Grid, cells: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """2-D average pooling by area: each cell is the mean of the tokens under it, border tokens counted by overlap.

    Works for any pair of grids (24×24 to 13×14 too); equals plain average pooling where the cells divide the grid.

    Args:
        grid: (height, width) before.
        cells: (height, width) after, at most as large.

    Returns:
        anchors `[K]` (the token at each cell's centre), slot, source `[E]` int64 and weight `[E]` float32; the weights
        of a slot sum to 1.
    """
    (down, row, height), (across, column, width) = (_overlap(n, c) for n, c in zip(grid, cells, strict=True))
    slot = (down[:, None] * cells[1] + across).flatten()
    source = (row[:, None] * grid[1] + column).flatten()
    order = (slot * (grid[0] * grid[1]) + source).argsort()
    weight = (height[:, None] * width).flatten()
    anchors = _centres(grid[0], cells[0])[:, None] * grid[1] + _centres(grid[1], cells[1])
    return anchors.flatten(), slot[order], source[order], weight[order]


def nearest(rows: Tensor, to: Tensor, k: int = 1, own: Tensor | None = None) -> Tensor:
    """The ``k`` rows of ``to`` with the largest cosine to each of ``rows``, best first, `[..., n, k]`.

    Args:
        rows: `[..., n, D]`.
        to: `[..., N, D]`.
        own: `[..., n]`, where each row itself stands in ``to``: never its own neighbour.
    """
    to, found = (
        normalise(to).transpose(-1, -2),
        torch.empty((*rows.shape[:-1], k), dtype=torch.int64, device=rows.device),
    )
    for start in range(0, rows.shape[-2], CHUNK):
        part = slice(start, start + CHUNK)
        cosines = normalise(rows[..., part, :]) @ to
        if own is not None:
            cosines = cosines.scatter(-1, own[..., part, None], -torch.inf)
        found[..., part, :] = cosines.argmax(-1, keepdim=True) if k == 1 else cosines.topk(k, -1).indices
    return found


def sizes_of(slot: Tensor, slots: int) -> Tensor:
    """How many entries each of ``slots`` slots has, `[..., slots]`, from `[..., E]`."""
    empty = torch.zeros((*slot.shape[:-1], slots), dtype=torch.int64, device=slot.device)
    return empty.scatter_add(-1, slot, torch.ones_like(slot))


def _overlap(size: int, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which of ``cells`` equal stretches meets which of ``size`` unit steps, and what share of it that step is."""
    edges, length = torch.arange(size, dtype=torch.float64), size / cells
    start = torch.arange(cells, dtype=torch.float64)[:, None] * length
    covered = (torch.minimum(edges + 1, start + length) - torch.maximum(edges, start)).clamp(min=0)
    covered[covered < 1e-9] = 0
    cell, step = covered.nonzero(as_tuple=True)
    return cell, step, (covered / covered.sum(-1, keepdim=True))[cell, step].float()


def _centres(size: int, cells: int) -> Tensor:
    return ((torch.arange(cells) * 2 + 1) * size).div(2 * cells, rounding_mode="floor")


def merge_by_rank(scores: Tensor, keep: int, favour_best: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the best by ``scores`` `[B, N]` and merge all others into the best of them, weighted by rank.

    Returns:
        Anchors `[B, keep]`, and slot, source and weight `[B, N]` of each entry.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    kept, merged = order[:, : keep - 1], order[:, keep - 1 :]
    rank = torch.arange(1, merged.shape[1] + 1, device=order.device, dtype=torch.float32)
    weight = (rank.flip(0) if favour_best else rank) / rank.sum()
    anchors, places = torch.cat([kept, merged[:, :1]], -1).sort(-1)
    slot = places.argsort(-1)
    slot = torch.cat([slot[:, :-1], slot[:, -1:].expand_as(merged)], -1)
    return anchors, slot, order, torch.cat([torch.ones_like(kept, dtype=torch.float32), weight.expand_as(merged)], -1)
