"""PAR: retrieve clusters of tokens by the prompt, and keep the few most relevant tokens of each."""

from dataclasses import dataclass

import torch

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import CHUNK, connected, normalise, rank_in_group, rows_at, sizes_of, text_similarity
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


@register("par", paper="arXiv:2410.07278v2", needs=Needs(user_text=True))
@dataclass(frozen=True)
class Par(Method):
    """Keep the best tokens of the clusters that match the prompt, and merge the other tokens of a cluster into them.

    Clusters are tokens joined by cosines of at least ``threshold``, ordered by the cosine of their mean to the best
    word. Each cluster may keep the share ``route`` of its tokens, the most relevant. If every cluster has its share and
    budget remains, the other tokens follow in the same order. A cluster that keeps no token is dropped; in the others,
    tokens that are not kept are averaged into the nearest kept token.

    Args:
        keep: tokens per image, or a share of them.
        threshold: cosine from which two tokens count as equivalent.
        largest: tokens per cluster at most.
        route: share of a cluster's tokens that it may keep, at least one.

    Cost: O(N²·D) time per round of the clustering, whose number depends on the image; O(N·min(N, 1,024)) extra memory.
    Paper: "Retrieval Replace Reduction: An effective visual token reduction method via semantic match", 2024, v2, which
    names retrieval of clusters and a router but no constants: all numbers here are ours.
    """

    keep: Budget = 0.11
    threshold: float = 0.8
    largest: int = 16
    route: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.route <= 1 or self.largest < 1:
            raise Refusal(f"route must be a share in (0, 1], largest at least 1; got {self.route}, {self.largest}")

    def reduce(self, image: ConnectorTokens) -> Reduction:
        rows, total, text = normalise(image.features), image.total, given(image.user_text)
        cluster = connected(rows, self.threshold, self.largest)  # [B, N], numbers below N
        size = sizes_of(cluster, total)
        sums = torch.zeros_like(rows).scatter_add(1, cluster[..., None].expand_as(rows), image.features.float())
        relevance = text_similarity(rows, text.features, text.mask, "tokens")
        # the cosine of a sum is that of the mean; −2 puts unused cluster numbers last
        retrieved = text_similarity(sums, text.features, text.mask, "tokens").masked_fill(size == 0, -2)
        turn = retrieved.sort(dim=-1, descending=True, stable=True).indices.argsort(-1).gather(-1, cluster)
        place = rank_in_group(relevance, cluster, total)
        over_share = place >= (size * self.route).ceil().gather(-1, cluster)
        # sort by (over_share, turn, place) in one key, since turn and place are below N
        order = ((over_share * total + turn) * total + place).argsort(-1)
        kept = order[:, : image.budget].sort(-1).values

        nearest, kept_cluster = [], cluster.gather(-1, kept)[:, None]
        for part, part_cluster in zip(torch.split(rows, CHUNK, 1), torch.split(cluster, CHUNK, 1), strict=True):
            similarity = part @ rows_at(rows, kept).transpose(-1, -2)
            nearest.append(similarity.masked_fill(part_cluster[..., None] != kept_cluster, -torch.inf).max(-1))
        slot = torch.cat([part.indices for part in nearest], 1)
        slot = slot.scatter(-1, kept, torch.arange(image.budget, device=slot.device).expand_as(kept))
        merged = ~torch.cat([part.values for part in nearest], 1).isinf()  # False in a cluster that keeps no token
        count = torch.zeros_like(kept).scatter_add(-1, slot, merged.long())
        source = torch.arange(total, device=slot.device).expand_as(slot)
        return image.merge(kept, slot, source, merged / count.gather(-1, slot).clamp(min=1), scores=relevance)
