"""PAR: clusters that the prompt asks for, and of each the few tokens that say it all."""

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
    """Retrieve clusters of tokens by the prompt, keep the best of each, and merge the rest of the cluster into them.

    Clusters are tokens joined by cosines of at least ``threshold``; clusters are taken by the cosine of their mean to
    the best word, and each may keep the share ``route`` of its tokens, the most relevant. When every cluster has its
    share and budget is left, the others follow in the same order. Clusters of which nothing is kept are dropped; in the
    others, what is not kept is averaged into the nearest kept token.

    Args:
        keep: tokens per image, or a share of them.
        threshold: cosine from which two tokens say the same.
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
        rows, total, wanted = normalise(image.features), image.total, image.budget
        text = given(image.user_text)
        cluster = connected(rows, self.threshold, self.largest)
        size = sizes_of(cluster, total)
        sums = torch.zeros_like(rows).scatter_add(1, cluster[..., None].expand_as(rows), image.features.float())
        relevance = text_similarity(rows, text.features, text.mask, "tokens")
        asked = text_similarity(sums, text.features, text.mask, "tokens").masked_fill(size == 0, -2)
        turn = asked.sort(dim=-1, descending=True, stable=True).indices.argsort(-1).gather(-1, cluster)
        place = rank_in_group(relevance, cluster, total)
        late = place >= (size * self.route).ceil().gather(-1, cluster)
        order = ((late * total + turn) * total + place).argsort(-1)
        kept = order[:, :wanted].sort(-1).values

        joined, home = [], cluster.gather(-1, kept)[:, None]
        for part, own in zip(torch.split(rows, CHUNK, 1), torch.split(cluster, CHUNK, 1), strict=True):
            near = part @ rows_at(rows, kept).transpose(-1, -2)
            joined.append(near.masked_fill(own[..., None] != home, -torch.inf).max(-1))
        slot = torch.cat([j.indices for j in joined], 1)
        slot = slot.scatter(-1, kept, torch.arange(wanted, device=slot.device).expand_as(kept))
        found = ~torch.cat([j.values for j in joined], 1).isinf()
        count = torch.zeros_like(kept).scatter_add(-1, slot, found.long())
        every = torch.arange(total, device=slot.device).expand_as(slot)
        return image.merge(kept, slot, every, found / count.gather(-1, slot).clamp(min=1), scores=relevance)
