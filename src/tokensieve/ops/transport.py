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
    right = torch.ones_like(kernel[..., 0, :])
    for _ in range(steps):  # scale rows to sum to 1/N, then columns to sum to 1/M
        left = 1 / (sources * (kernel @ right[..., None]).squeeze(-1))
        right = 1 / (targets * (left[..., None, :] @ kernel).squeeze(-2))
    return left * (kernel @ right[..., None]).squeeze(-1)
