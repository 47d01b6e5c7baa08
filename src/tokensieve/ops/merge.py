"""Merges as the entries of a sparse matrix: slot, source token and weight of each entry."""

import torch
from torch import Tensor

from tokensieve.ops.score import CHUNK, normalise, rows_at

Grid = tuple[int, int]


def pooled_grid(grid: Grid, k: int) -> Grid:
    """Return the largest grid of at most ``k`` cells with the shape of ``grid``, e.g. (24, 24), 192 to (13, 14)."""
    height, width = grid

    def size(cells: Grid) -> tuple[int, int]:  # the side of the same shape that fits inside, then the number of cells
        return min(cells[0] * width, cells[1] * height), cells[0] * cells[1]

    return max(((h, min(width, k // h)) for h in range(1, min(height, k) + 1)), key=size)


def keep_and_average(
    kept: Tensor, sources: Tensor, cluster: Tensor, centres: Tensor, *, appended: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep some tokens unchanged and merge the others into the means of C clusters.

    Args:
        kept: `[..., K]` tokens that are kept, ascending.
        sources: `[..., S]` tokens that are averaged.
        cluster: `[..., S]`, cluster number of each source.
        centres: `[..., C]`, numbers among the sources; the anchor of a cluster's mean is its centre.
        appended: the means follow after the kept tokens in the order of ``centres``, within the same sorted anchors.

    Returns:
        anchors `[..., K + C]`, slot, source `[..., K + S]` and weight; the weights of a slot sum to 1.
    """
    k = kept.shape[-1]
    anchors, order = torch.cat([kept, sources.gather(-1, centres)], -1).sort(-1)
    # argsort inverts the sort: [..., K + C], the slot of each kept token, then of each cluster
    slots = torch.arange(order.shape[-1], device=order.device).expand_as(order) if appended else order.argsort(-1)
    sizes = torch.zeros_like(centres).scatter_add(-1, cluster, torch.ones_like(cluster))
    slot = torch.cat([slots[..., :k], slots.gather(-1, cluster + k)], -1)
    weight = torch.cat([torch.ones_like(kept, dtype=torch.float32), 1 / sizes.gather(-1, cluster)], -1)
    return anchors, slot, torch.cat([kept, sources], -1), weight


def area_pool(grid: Grid, cells: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Average the tokens of a grid by area: a token on a border counts in each cell by its overlap.

    Any two grids work (24×24 to 13×14, for example). If the cells divide the grid, this is plain average pooling.

    Args:
        grid: (height, width) before.
        cells: (height, width) after, at most as large.

    Returns:
        anchors `[K]` (the token at each cell's centre), slot, source `[E]` int64 and weight `[E]` float32; the weights
        of a slot sum to 1.
    """
    # the overlap of rectangles is the outer product of the overlaps along both axes
    (down, row, height), (across, column, width) = (_overlap(n, c) for n, c in zip(grid, cells, strict=True))
    slot = (down[:, None] * cells[1] + across).flatten()
    source = (row[:, None] * grid[1] + column).flatten()
    order = (slot * (grid[0] * grid[1]) + source).argsort()
    weight = (height[:, None] * width).flatten()
    anchors = _centres(grid[0], cells[0])[:, None] * grid[1] + _centres(grid[1], cells[1])
    return anchors.flatten(), slot[order], source[order], weight[order]


def nearest(rows: Tensor, targets: Tensor, k: int = 1, self_index: Tensor | None = None) -> Tensor:
    """Find the ``k`` rows of ``targets`` with the largest cosine to each of ``rows``, best first, `[..., n, k]`.

    Args:
        rows: `[..., n, D]`.
        targets: `[..., N, D]`.
        self_index: `[..., n]`, the index of each row itself in ``targets``, which is excluded.
    """
    targets = normalise(targets).transpose(-1, -2)
    indices = torch.empty((*rows.shape[:-1], k), dtype=torch.int64, device=rows.device)
    for start in range(0, rows.shape[-2], CHUNK):
        part = slice(start, start + CHUNK)
        cosines = normalise(rows[..., part, :]) @ targets
        if self_index is not None:
            cosines = cosines.scatter(-1, self_index[..., part, None], -torch.inf)
        indices[..., part, :] = cosines.argmax(-1, keepdim=True) if k == 1 else cosines.topk(k, -1).indices
    return indices


def sizes_of(slot: Tensor, slots: int) -> Tensor:
    """Count the entries of each slot, `[..., E]` to `[..., slots]`."""
    empty = torch.zeros((*slot.shape[:-1], slots), dtype=torch.int64, device=slot.device)
    return empty.scatter_add(-1, slot, torch.ones_like(slot))


def _overlap(size: int, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which of ``cells`` equal intervals meets which of ``size`` unit steps, and the step's share of it."""
    edges, length = torch.arange(size, dtype=torch.float64), size / cells
    start = torch.arange(cells, dtype=torch.float64)[:, None] * length
    covered = (torch.minimum(edges + 1, start + length) - torch.maximum(edges, start)).clamp(min=0)
    covered[covered < 1e-9] = 0  # rounding is no overlap
    cell, step = covered.nonzero(as_tuple=True)
    return cell, step, (covered / covered.sum(-1, keepdim=True))[cell, step].float()


def _centres(size: int, cells: int) -> Tensor:
    """Return the unit step at the centre of each of ``cells`` equal intervals."""
    return ((torch.arange(cells) * 2 + 1) * size).div(2 * cells, rounding_mode="floor")


def merge_by_rank(scores: Tensor, keep: int, favour_best: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the ``keep`` − 1 best by ``scores`` `[B, N]` and merge all others into the best of them, weighted by rank.

    Returns:
        anchors `[B, keep]`, and slot, source and weight `[B, N]` of each entry.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    kept, merged = order[:, : keep - 1], order[:, keep - 1 :]
    rank = torch.arange(1, merged.shape[1] + 1, device=order.device, dtype=torch.float32)
    weight = (rank.flip(0) if favour_best else rank) / rank.sum()
    anchors, order_of_anchors = torch.cat([kept, merged[:, :1]], -1).sort(-1)
    slot = order_of_anchors.argsort(-1)  # argsort inverts the sort: the slot of each kept token, then of the merged one
    slot = torch.cat([slot[:, :-1], slot[:, -1:].expand_as(merged)], -1)
    return anchors, slot, order, torch.cat([torch.ones_like(kept, dtype=torch.float32), weight.expand_as(merged)], -1)


def merge_by_error(rows: Tensor, keep: int, basis: int, official: str = "") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep some basis rows and the rows that they approximate worst; average the others into the latter (ApET).

    Each other row joins the row of highest cosine among those that stay for their error. At most ``keep`` − 1 of the
    basis rows stay.

    Args:
        rows: `[B, N, D]`.
        keep: rows that stay.
        basis: basis rows, the result of :func:`farthest`.
        official: "by place" or "by error": as in the official code, the basis rows stand at the places of the rows of
            least error among ``keep``, in the order of these places or of their errors, and are averaged like the
            others besides. The rows of these places are lost.

    Returns:
        anchors `[B, keep]`, and slot, source and weight of each entry.
    """
    rows, token = rows.float(), torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[:2])
    chosen = farthest(rows, min(basis, rows.shape[1]))
    errors, chosen = approximation_error(rows, rows_at(rows, chosen)), chosen[:, : keep - 1]
    few = chosen.shape[1]
    # without the official places, a basis row ranks last: it stays for another reason than its error
    ranked = errors if official else errors.scatter(1, chosen, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    worst, places = order[:, : keep - few], order[:, keep - few : keep]
    slot = nearest(rows, rows_at(rows, worst)).squeeze(-1).scatter(1, worst, token[:, : keep - few])
    numbers = token[:, keep - few : keep]  # the slots of the basis rows, after the others
    if not official:
        slot = slot.scatter(1, chosen, numbers)
        return torch.cat([worst, chosen], 1), slot, token, 1 / sizes_of(slot, keep).gather(1, slot)
    places = places.sort(-1).values if official == "by place" else places
    stays = torch.ones_like(errors).scatter(1, places, 0)
    weight = stays / torch.zeros_like(errors).scatter_add(1, slot, stays).gather(1, slot)
    slot, source = torch.cat([slot, numbers], 1), torch.cat([token, chosen], 1)
    return torch.cat([worst, places], 1), slot, source, torch.cat([weight, torch.ones_like(weight[:, :few])], 1)


@torch.no_grad()
def farthest(rows: Tensor, k: int) -> Tensor:
    """Select ``k`` rows `[B, N, D]`: the longest, then each time the farthest from those before it, `[B, k]`."""
    distance = torch.full_like(rows[..., 0], torch.inf)
    best, chosen = rows.norm(dim=-1).argmax(-1, keepdim=True), []
    for _ in range(k):
        chosen.append(best)
        # to the nearest selected row; a selected row is never the farthest again, and fmin ignores NaN
        squares = (rows - rows_at(rows, best)).square().sum(-1)
        distance = torch.fmin(distance, squares).scatter(-1, best, -1)
        best = distance.argmax(-1, keepdim=True)
    return torch.cat(chosen, -1)


def approximation_error(rows: Tensor, basis: Tensor) -> Tensor:
    """Return the distance of rows `[B, N, D]` to their best combination of ``basis`` `[B, F, D]`, `[B, N]`.

    The diagonal of the basis' products grows by 1e-5, as in ApET's code.
    """
    # in float64, the products of equal basis rows can be solved as well
    products = (basis @ basis.mT).double()
    ridge = 1e-5 * torch.eye(basis.shape[1], dtype=products.dtype, device=rows.device)
    weights = torch.linalg.solve(products + ridge, (basis @ rows.mT).double()).to(rows.dtype)
    errors: Tensor = (rows - weights.mT @ basis).norm(dim=-1)
    return errors
