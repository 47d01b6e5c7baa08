"""Recycle pruned tokens inside the LLM as SparseVLM does: the best of them become means of clusters."""

import torch
from torch import Tensor

from tokensieve.ops import density_peaks, keep_and_average
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens


def recycled_and_clusters(pruned: int, share: float) -> tuple[int, int]:
    """Return how many of the ``pruned`` tokens are clustered, and the number of clusters."""
    if not pruned or not share:
        return 0, 0
    recycled = int(share * pruned) + 1
    return recycled, recycled // 10 + 1


def recycle(
    image: DecoderTokens, scores: Tensor, kept: Tensor, share: float, appended: bool, noise_seed: int | None
) -> Reduction:
    """Keep the tokens ``kept`` `[B, K]` as they are, and the means of clusters of the best pruned ones.

    Args:
        scores: `[B, N]`.
        share: share of the pruned tokens that is clustered.
        appended: the means stand after the kept tokens, by falling density times distance of their centres; else at
            their centres' places.
        noise_seed: break ties of the clustering by noise of this seed.
    """
    count, clusters = recycled_and_clusters(image.total - kept.shape[-1], share)
    if not count:
        return image.keep(kept, scores)
    noise = None
    # kept tokens rank last, so that the first `count` are the best pruned ones
    order = scores.scatter(-1, kept, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    sources = order[:, :count]
    if noise_seed is not None:  # drawn on the CPU: the same noise on every device and in every batch
        drawn = torch.rand(1, count, generator=torch.Generator().manual_seed(noise_seed))
        noise = 1e-6 * drawn.to(scores.device)
    rows = image.features.take_along_dim(sources[..., None], -2)
    centres, cluster = density_peaks(rows, clusters, clusters, noise)
    mixing = keep_and_average(kept, sources, cluster, centres, appended=appended)
    notes = ("means of recycled tokens stand after the kept ones: no slot is at its token's place",) * appended
    return image.merge(*mixing, *notes)
