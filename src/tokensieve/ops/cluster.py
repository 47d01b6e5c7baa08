"""Clustering of rows: each row gets the number of a cluster. Ties go to the lower index, unless noise breaks them."""

import torch
from torch import Tensor

from tokensieve.ops.score import CHUNK, normalise, rows_at


def density_peaks(rows: Tensor, clusters: int, neighbours: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cluster rows by DPC-kNN: the centres are dense and far from denser rows; each row joins its nearest centre.

    Args:
        rows: `[..., N, D]`.
        clusters: number of clusters.
        neighbours: k nearest rows, including the row itself.
        noise: `[..., N]`, added to the densities. Official codes break ties with it.

    Returns:
        centres `[..., clusters]`, by falling density times distance, and the cluster number of each row, `[..., N]`.
    """
    centres = peak_scores(rows, neighbours, noise).sort(dim=-1, descending=True, stable=True).indices[..., :clusters]
    return centres, join_nearest(rows, centres)


def peak_scores(rows: Tensor, neighbours: int, noise: Tensor | None = None, *, by_radius: bool = False) -> Tensor:
    """Multiply each row's density by its distance to the nearest denser row, `[..., N]`: large for cluster centres.

    Density is ``exp(-mean squared distance to the k nearest rows)``; distances are Euclidean over √D. Among equally
    dense rows the earlier counts as denser. The densest row gets the largest of all distances.

    Args:
        by_radius: rows that are not denser count, too, at the distance to the row that is farthest from them. The
            densest row then gets the smallest of these distances.
    """
    # two passes over the distances, chunk by chunk: the second needs the densities of all rows
    index, mean_squares, farthest = torch.arange(rows.shape[-2], device=rows.device), [], []
    for chunk in torch.split(index, CHUNK):
        distance = _distance(rows, chunk)
        farthest.append(distance.amax(-1))
        closest = distance.topk(min(neighbours, len(index)), dim=-1, largest=False).values
        mean_squares.append(closest.square().mean(-1))
    density = (-torch.cat(mean_squares, -1)).exp()
    density = density if noise is None else density + noise
    radius, separations = torch.cat(farthest, -1), []
    limit = radius if by_radius else radius.amax(-1, keepdim=True)  # of rows that are not denser
    for chunk in torch.split(index, CHUNK):
        distance, chunk_density = _distance(rows, chunk), density[..., chunk, None]
        earlier = (density[..., None, :] == chunk_density) & (index < chunk[:, None])
        denser = (density[..., None, :] > chunk_density) | earlier
        separations.append(torch.where(denser, distance, limit[..., None, :]).amin(-1))
    return density * torch.cat(separations, -1)


def join_nearest(rows: Tensor, centres: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the number of the nearest of the ``centres`` `[..., C]` for each row, `[..., N]`; a centre joins itself.

    Args:
        valid: `[..., C]` bool, False on padding, which no row joins.
    """
    centre_rows = rows_at(rows, centres)
    number = torch.arange(centres.shape[-1], device=rows.device).expand_as(centres)
    joined = []
    for chunk in torch.split(rows, CHUNK, dim=-2):
        distance = torch.cdist(chunk.float(), centre_rows.float())
        joined.append((distance if valid is None else distance.masked_fill(~valid[..., None, :], torch.inf)).argmin(-1))
    if valid is not None:  # padding repeats the last centre: the scatter must write the same number for both
        number = torch.minimum(number, valid.sum(-1, keepdim=True) - 1)
    return torch.cat(joined, -1).scatter(-1, centres, number)  # of two equal centres each still joins itself


def connected(rows: Tensor, threshold: float, largest: int) -> Tensor:
    """Number the connected components of the graph that joins rows of cosine ≥ ``threshold``, `[..., N]`.

    A component of more than ``largest`` rows is cut into runs of that many, in order. Clusters are numbered by their
    first rows. The number of rounds depends on the rows.
    """
    rows = normalise(rows)
    index = torch.arange(rows.shape[-2], device=rows.device).expand(rows.shape[:-1])
    label = index  # each round, a row takes the smallest label among its neighbours, until no label changes
    while True:
        smallest = []
        for chunk in torch.split(rows, CHUNK, dim=-2):
            joined = chunk @ rows.transpose(-1, -2) >= threshold
            smallest.append(label[..., None, :].expand_as(joined).masked_fill(~joined, rows.shape[-2]).amin(-1))
        lower = torch.minimum(torch.cat(smallest, -1), label)
        lower = lower.gather(-1, lower)  # pointer jumping: a label's own label reaches far rows in fewer rounds
        if torch.equal(lower, label):
            break
        label = lower
    order = label.sort(dim=-1, stable=True).indices
    rank = order.argsort(-1)  # [..., N]: the place of each row when the rows are sorted by component
    start = torch.full_like(rank, rows.shape[-2]).scatter_reduce(-1, label, rank, "amin").gather(-1, label)
    first = rank - (rank - start) % largest  # the place of the first row of each row's run
    first_row = order.gather(-1, first)
    is_first = first_row == index
    return (is_first.long().cumsum(-1) - 1).gather(-1, first_row)  # count the first rows up to each run's own


def _distance(rows: Tensor, chunk: Tensor) -> Tensor:
    """Return the distances over √D from the rows at ``chunk`` `[c]` to all rows, `[..., c, N]`."""
    distance: Tensor = torch.cdist(rows[..., chunk, :].float(), rows.float()) / rows.shape[-1] ** 0.5
    return distance
