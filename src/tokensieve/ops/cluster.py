"""Clusters: rows in, a centre for each row out. Deterministic: ties go to the lower index, unless noise is given."""

import torch
from torch import Tensor

from tokensieve.ops.score import CHUNK, normalise, rows_at


def density_peaks(rows: Tensor, clusters: int, neighbours: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """DPC-kNN: centres are dense and far from anything denser; every row joins its nearest centre.

    Args:
        rows: `[..., N, D]`.
        clusters: how many.
        neighbours: k, itself counted.
        noise: `[..., N]`, added to the densities; official codes break ties with it.

    Returns:
        centres `[..., clusters]`, ascending, and for each row the number of its cluster, `[..., N]`.
    """
    centres = peak_scores(rows, neighbours, noise).sort(dim=-1, descending=True, stable=True).indices[..., :clusters]
    centres = centres.sort(-1).values
    return centres, join_nearest(rows, centres)


def peak_scores(rows: Tensor, neighbours: int, noise: Tensor | None = None) -> Tensor:
    """Density times distance to the nearest denser row, `[..., N]`: large for the centres of clusters.

    Density is ``exp(-mean squared distance to the k nearest rows)``, distances are Euclidean over √D. Of equally dense
    rows the earlier counts as denser; the densest of all gets the largest distance there is.
    """
    index, near = torch.arange(rows.shape[-2], device=rows.device), []
    for chunk in torch.split(index, CHUNK):
        closest = _distance(rows, chunk).topk(min(neighbours, len(index)), dim=-1, largest=False).values
        near.append(closest.square().mean(-1))
    density = (-torch.cat(near, -1)).exp()
    density = density if noise is None else density + noise
    separation, farthest = [], []
    for chunk in torch.split(index, CHUNK):
        distance, own = _distance(rows, chunk), density[..., chunk, None]
        earlier = (density[..., None, :] == own) & (index < chunk[:, None])
        denser = (density[..., None, :] > own) | earlier
        separation.append(distance.masked_fill(~denser, torch.inf).amin(-1))
        farthest.append(distance.amax((-1, -2)))
    apart, limit = torch.cat(separation, -1), torch.stack(farthest, -1).amax(-1)[..., None]
    return density * torch.where(apart.isinf(), limit, apart)


def join_nearest(rows: Tensor, centres: Tensor, real: Tensor | None = None) -> Tensor:
    """The number of the nearest of ``centres`` `[..., C]` for each row, `[..., N]`; a centre is its own.

    Args:
        real: `[..., C]` bool, False on padding that nobody may join.
    """
    places = rows_at(rows, centres)
    own = torch.arange(centres.shape[-1], device=rows.device).expand_as(centres)
    joined = []
    for chunk in torch.split(rows, CHUNK, dim=-2):
        distance = torch.cdist(chunk.float(), places.float())
        joined.append((distance if real is None else distance.masked_fill(~real[..., None, :], torch.inf)).argmin(-1))
    if real is not None:  # padding repeats a real centre: let it say the same
        own = torch.minimum(own, real.sum(-1, keepdim=True) - 1)
    return torch.cat(joined, -1).scatter(-1, centres, own)


def connected(rows: Tensor, threshold: float, largest: int) -> Tensor:
    """Connected components of the graph that joins rows of cosine ≥ ``threshold``: a number per row, `[..., N]`.

    A component of more than ``largest`` rows is cut into stretches of that many, in order. Clusters are numbered by
    their first rows. The number of rounds, not only their cost, depends on the rows.
    """
    rows = normalise(rows)
    index = torch.arange(rows.shape[-2], device=rows.device).expand(rows.shape[:-1])
    label = index
    while True:
        parts = []
        for chunk in torch.split(rows, CHUNK, dim=-2):
            joined = chunk @ rows.transpose(-1, -2) >= threshold
            parts.append(label[..., None, :].expand_as(joined).masked_fill(~joined, rows.shape[-2]).amin(-1))
        lower = torch.minimum(torch.cat(parts, -1), label)
        lower = lower.gather(-1, lower)
        if torch.equal(lower, label):
            break
        label = lower
    order = label.sort(dim=-1, stable=True).indices
    place = order.argsort(-1)
    start = torch.full_like(place, rows.shape[-2]).scatter_reduce(-1, label, place, "amin").gather(-1, label)
    first = place - (place - start) % largest  # each row's cluster, named by the place of its first row
    named = order.gather(-1, first)
    is_first = named == index
    return (is_first.long().cumsum(-1) - 1).gather(-1, named)


def _distance(rows: Tensor, chunk: Tensor) -> Tensor:
    """Distances of some rows to all, over √D, `[..., c, N]`."""
    distance: Tensor = torch.cdist(rows[..., chunk, :].float(), rows.float()) / rows.shape[-1] ** 0.5
    return distance
