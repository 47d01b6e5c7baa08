"""VLM-Pruner: from a few pivots outwards, keep tokens that resemble no kept one, the nearer ones first."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod, DecoderNeeds, register
from tokensieve.ops import gram, normalise, set_true, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens, given

NO_GRID = "the tokens have no places on one grid: chosen by similarity alone"


@register("vlm-pruner", paper="arXiv:2512.02700", stage="decoder", needs=DecoderNeeds(keys=True, grid=True))
@dataclass(frozen=True)
class VlmPruner(DecoderMethod):
    """Keep a few pivots, then tokens that do not resemble a kept one, and add to these what resembles them most.

    Pivots: the token with the largest L1 norm of its key, then each time the one whose key is farthest from all pivots.
    Then, in batches of the lowest first, tokens whose likeness to the kept ones is below ``similar``; each later round
    allows 0.1 more. A likeness is the largest cosine to a kept token · (1 + the distance to the nearest kept
    one / (2 · the grid's diagonal)), so that of equals the nearer one comes first. Cosines are of the 256 channels that
    vary most. At last, a kept token becomes 0.3 of itself + 0.7 of the mean, by cosine, of those dropped that resemble
    it most.

    Args:
        keep: tokens per image from layer ``layer`` on, or a share of them (the paper: 33.3 %, 22.2 % and 11.1 %).
        average: instead of ``keep``, tokens averaged over all layers.
        layer: the first layer that receives the shorter sequence.
        pivots: number of pivots.
        similar: the likeness below which tokens stay in the first round.
        batch: tokens that are compared with the kept ones at once.
        channels: number of channels of the cosines.

    Cost: O(N²·(C + R)) time for C channels and R rounds, in N/``batch`` steps each; O(N²) extra memory.
    Paper: "VLM-Pruner: Buffering for Spatial Sparsity in an Efficient VLM Centrifugal Token Pruning Paradigm", 2025.
    Official code: stops short of the budget if a round keeps no token; here the next round follows.
    """

    keep: Budget = 0.111
    average: Budget | None = None
    layer: int | float = 2
    pivots: int = 4
    similar: float = 0.8
    batch: int = 16
    channels: int = 256
    least: ClassVar = {"pivots": 1, "batch": 1, "channels": 1}

    def reduce(self, image: DecoderTokens) -> Reduction:
        rows = image.features.float()
        varying = top_k(rows.var(1), min(self.channels, rows.shape[-1]))  # [B, C], by their variance over the tokens
        cosine = gram(normalise(rows.take_along_dim(varying[:, None], -1)))
        image, distance = self.distances(image)
        pivots = _pivots(given(image.keys).float(), min(self.pivots, image.budget))
        kept = self.outwards(pivots, cosine, distance, image.budget)
        anchors = top_k(kept.int(), image.budget)
        # each dropped token merges into the kept one that it resembles most, with its cosine as weight
        others = top_k((~kept).int(), image.total - image.budget)
        to_kept = cosine.take_along_dim(others[..., None], 1).take_along_dim(anchors[:, None], 2)
        weight, slot = to_kept.max(-1)
        sums = weight.new_zeros(anchors.shape).scatter_add(-1, slot, weight)
        share = (0.7 * weight / sums.clamp(min=1e-8).gather(-1, slot)).where((sums > 0).gather(-1, slot), 0)
        slot = torch.cat([torch.arange(image.budget, device=slot.device).expand_as(anchors), slot], -1)
        weight = torch.cat([torch.where(sums > 0, 0.3, 1.0), share], -1)
        return image.merge(anchors, slot, torch.cat([anchors, others], -1), weight)

    def distances(self, image: DecoderTokens) -> tuple[DecoderTokens, Tensor]:
        """Return the distances of all pairs as shares of the grid's diagonal, `[B, N, N]`: 0 without a grid."""
        if image.coordinates is None:
            return image.noted(NO_GRID), torch.zeros_like(image.features[..., :1])
        places = image.coordinates.float()
        height_width = places.amax((0, 1)) + 1 if image.grid is None else places.new_tensor(image.grid)
        return image, torch.cdist(places, places) / height_width.norm()

    def outwards(self, pivots: Tensor, cosine: Tensor, distance: Tensor, k: int) -> Tensor:
        """Return the mask of k tokens that stay, `[B, N]` bool, from the pivots `[B, P]` outwards."""
        kept = set_true(torch.zeros_like(cosine[..., 0], dtype=torch.bool), pivots)
        tokens_in_order, threshold = torch.arange(kept.shape[1], device=kept.device).expand_as(kept), self.similar
        while bool((kept.sum(-1) < k).any()):
            order = _likeness(tokens_in_order, kept, cosine, distance).sort(dim=-1, stable=True).indices
            for tokens in torch.split(order, self.batch, -1):
                likeness = _likeness(tokens, kept, cosine, distance)
                rank = likeness.sort(dim=-1, stable=True).indices.argsort(-1)
                stays = (likeness < threshold) & (rank < k - kept.sum(-1, keepdim=True))
                kept = kept.scatter(-1, tokens, stays | kept.gather(-1, tokens))
            threshold += 0.1
        return kept


def _likeness(tokens: Tensor, kept: Tensor, cosine: Tensor, distance: Tensor) -> Tensor:
    """Return the likeness of tokens `[B, T]` to the kept ones `[B, N]`: see the class; infinite if they are kept."""
    cosines, distances = (pairs.take_along_dim(tokens[..., None], 1) for pairs in (cosine, distance))  # [B, T, N]
    nearest = distances.masked_fill(~kept[:, None], torch.inf).amin(-1)
    likeness = cosines.masked_fill(~kept[:, None], -torch.inf).amax(-1) * (1 + nearest / 2)
    # NaN, from states that overflow, would never be below a threshold
    return likeness.where(likeness < 1.5, 1.5).masked_fill(kept.gather(-1, tokens), torch.inf)


def _pivots(keys: Tensor, number: int) -> Tensor:
    """Return the token with the longest key `[B, N, E]` (L1), then those farthest from all before, `[B, P]`."""
    pivots: Tensor = keys.norm(1, -1).argmax(-1, keepdim=True)
    distance = torch.full_like(keys[..., 0], torch.inf)
    for _ in range(number - 1):
        distance = distance.minimum((keys - keys.take_along_dim(pivots[:, -1:, None], 1)).norm(dim=-1))
        pivots = torch.cat([pivots, distance.argmax(-1, keepdim=True)], -1)
    return pivots
