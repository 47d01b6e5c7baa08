"""Clusters: rows in, a centre for each row out. Deterministic: ties go to the lower index, unless noise is given."""

import torch
from torch import Tensor


def density_peaks(rows: Tensor, clusters: int, neighbours: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """DPC-kNN: centres are dense and far from anything denser; every row joins its nearest centre.

    Density is ``exp(-mean squared distance to the k nearest rows)``, distances are Euclidean over √D.

    Args:
        rows: `[..., N, D]`.
        clusters: how many.
        neighbours: k, itself counted.
        noise: `[..., N]`, added to the densities; official codes break ties with it.

    Returns:
        centres `[..., clusters]`, ascending, and for each row the number of its cluster, `[..., N]`.
    """
    distance = torch.cdist(rows.float(), rows.float()) / rows.shape[-1] ** 0.5
    near = distance.topk(min(neighbours, distance.shape[-1]), dim=-1, largest=False).values
    density = (-near.square().mean(-1)).exp()
    density = density if noise is None else density + noise
    index = torch.arange(rows.shape[-2], device=rows.device)
    earlier = (density[..., None, :] == density[..., None]) & (index < index[:, None])
    denser = (density[..., None, :] > density[..., None]) | earlier
    farthest = distance.amax((-1, -2), keepdim=True)
    separation = distance.where(denser, farthest).amin(-1)
    centres = (density * separation).sort(dim=-1, descending=True, stable=True).indices[..., :clusters]
    centres = centres.sort(-1).values
    to_centre = distance.take_along_dim(centres[..., None, :], -1)
    own = torch.arange(clusters, device=rows.device).expand_as(centres)
    return centres, to_centre.argmin(-1).scatter(-1, centres, own)
