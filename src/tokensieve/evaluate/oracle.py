"""The oracle: keep the tokens of the asked object first, whose place is known. No method, and no upper bound."""

from __future__ import annotations

import torch

from tokensieve.budget import Budget, count
from tokensieve.errors import Refusal
from tokensieve.evaluate.data import Box
from tokensieve.ops import uniform
from tokensieve.reduction import Reduction

NOTE = "oracle: the tokens of the asked object first, the rest uniformly; it knows the answer's place"


def oracle(
    boxes: tuple[Box, ...], size: tuple[int, int], total: int, grid: tuple[int, int] | None, keep: Budget
) -> Reduction:
    """Keep the tokens that the boxes cover most, in turn for each box, then a uniform subset of the rest.

    Args:
        boxes: (left, top, right, bottom) px of each object that answers the question; empty if there is none.
        size: (width, height) px of the image; the grid is taken to span all of it.
        total, grid: the visual tokens of the image, and their (height, width).
        keep: the budget.

    Raises:
        Refusal: the tokens form no grid.
    """
    if grid is None:
        raise Refusal(f"the oracle needs tokens on a grid; these {total} tokens have none")
    budget = count(keep, total)
    # turn[i]: the round in which token i is taken. Round r takes the r-th best token of every box; `total` means never.
    turn = torch.full((total,), total)
    for left, top, right, bottom in boxes:
        rows, columns = _overlap(top, bottom, size[1], grid[0]), _overlap(left, right, size[0], grid[1])
        overlap = torch.outer(rows, columns).flatten()
        rank = overlap.argsort(descending=True, stable=True).argsort()  # the inverse permutation: place of each token
        turn = torch.where(overlap > 0, torch.minimum(turn, rank), turn)
    order = turn.argsort(stable=True)
    covered = order[: min(budget, int((turn < total).sum()))]
    remaining = order[len(covered) :].sort().values
    fill = remaining[uniform(len(remaining), budget - len(covered))] if budget > len(covered) else remaining[:0]
    return Reduction(total, torch.cat([covered, fill]).sort().values, grid=grid, notes=(NOTE,))


def _overlap(low: float, high: float, length: int, cells: int) -> torch.Tensor:
    """Return the share of each of ``cells`` equal parts of ``length`` px between ``low`` and ``high``, `[cells]`."""
    edges = torch.linspace(0, length, cells + 1)
    return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * cells / length
