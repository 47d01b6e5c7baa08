"""Optimal transport between two equally heavy sets of rows."""

import torch
from torch import Tensor


def sinkhorn_row_mass(cost: Tensor, epsilon: float, steps: int) -> Tensor:
    """Mass that each source row sends under the entropic plan, `[..., N, M]` to `[..., N]`; larger: cheaper to carry.

    Sinkhorn's updates end on the targets' side: after an update of the sources every row would send the same.

    Args:
        cost: from each source to each target.
        epsilon: strength of the entropy.
        steps: updates of both sides.
    """
    kernel = (-cost.float() / epsilon).exp()
    sources, targets = cost.shape[-2:]
    right = torch.ones_like(kernel[..., 0, :])
    for _ in range(steps):
        left = 1 / (sources * (kernel @ right[..., None]).squeeze(-1))
        right = 1 / (targets * (left[..., None, :] @ kernel).squeeze(-2))
    return left * (kernel @ right[..., None]).squeeze(-1)
