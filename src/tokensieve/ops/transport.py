"""Optimal transport between two sets of rows of equal mass."""

import torch
from torch import Tensor


def sinkhorn_row_mass(cost: Tensor, epsilon: float, steps: int) -> Tensor:
    """Return the row sums of the Sinkhorn transport plan, `[..., N, M]` to `[..., N]`; cheap rows send more mass.

    The last update is that of the targets: after an update of the sources all row sums would be equal.

    Args:
        cost: transport cost from each source to each target.
        epsilon: strength of the entropy regularisation.
        steps: number of updates of both sides.
    """
    kernel = (-cost.float() / epsilon).exp()
    sources, targets = cost.shape[-2:]
    column_scale = torch.ones_like(kernel[..., 0, :])
    for _ in range(steps):  # scale rows to sum to 1/N, then columns to sum to 1/M
        row_scale = 1 / (sources * (kernel @ column_scale[..., None]).squeeze(-1))
        column_scale = 1 / (targets * (row_scale[..., None, :] @ kernel).squeeze(-2))
    return row_scale * (kernel @ column_scale[..., None]).squeeze(-1)
