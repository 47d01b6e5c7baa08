"""FlashVID, the stage before the LLM: keep salient and diverse tokens, and merge the others along trees in time."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import (
    changing_segments,
    cluster_weights,
    density_peaks,
    in_proportion,
    max_min,
    nearest_in_previous,
    sizes_of,
)
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens


@register("flashvid", paper="arXiv:2602.08024", needs=Needs(cls_attention=-1, video=True))
@dataclass(frozen=True)
class FlashVid(Method):
    """Keep salient and diverse tokens of each frame, and merge the others along trees through time, then by clusters.

    Each other token follows its most similar one in the previous frame of its segment, anywhere in the picture. The
    means of these trees are merged into density peaks of their first frames. Segments end where frames differ most.

    Args:
        keep: tokens per video, or a share of them, the same number in each frame.
        salient: share of the budget for salient and diverse tokens, by greedy max–min distance (the paper's α).
        relevance: weight these distances by the product with the segment's mean, too (the official code for Qwen: no).
        follow: cosine to the previous frame above which a token follows.
        segments: at least so many segments (the official scripts for Qwen: 4).
        alike: frames whose cosine to the next is below this end a segment, too.
        official: count tokens and followers as the official code does; the video then decides how many tokens stay.

    Cost: one row of attention per frame, O(n²·D) time per frame of n tokens; a float32 copy of a segment.
    Paper: "FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging",
    ICLR 2026. It also drops tokens inside the LLM, as ``flashvid(keep=0.3125) + fastv(layer=20, keep=0.3)`` does: the
    mean over 28 layers is a quarter of the tokens, 0.3125 / 1.25.
    Official code: divides the sum of a tree by one plus the followers of its root, which is no mean if they have
    followers; rounds the clusters of each frame up; merges one token less where the budget limits the trees
    (``official=True``). It also clusters the kept tokens of segments of one frame again, so that some stay twice, and
    noise decides between equal densities; here neither.
    """

    keep: Budget = 0.25
    salient: float = 0.7
    relevance: bool = True
    follow: float = 0.8
    segments: int = 8
    alike: float = 0.9
    official: bool = False
    least: ClassVar = {"segments": 1}
    proportions: ClassVar = ("salient", "follow")

    def slots(self, budget: int, grid: tuple[int, int] | None) -> int | None:
        return None if self.official else super().slots(budget, grid)

    def reduce(self, image: ConnectorTokens) -> Reduction:
        attention = image.in_frames(image.cls_attention[-1])
        clips = zip(image.in_frames(image.features), attention, strict=True)
        into, weight = map(torch.stack, zip(*(self.reduce_clip(*clip, image.budget) for clip in clips), strict=True))
        image = image.noted("clusters are rounded up: there can be more than the budget") if self.official else image
        return image.merge_into(into, weight, scores=attention.flatten(1))

    def reduce_clip(self, rows: Tensor, attention: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """Return the token that each token of one video merges into (−1: none), and its weight, `[N]` each."""
        quota = in_proportion(budget, torch.full_like(attention[:, 0], rows.shape[1], dtype=torch.int64))
        into, weight = torch.full_like(attention, -1, dtype=torch.int64), torch.zeros_like(attention)
        for part in (slice(*segment) for segment in changing_segments(rows, self.alike, self.segments)):
            target, share = self.reduce_segment(rows[part], attention[part], quota[part])
            into[part], weight[part] = target + (target >= 0) * part.start * rows.shape[1], share
        return into.flatten(), weight.flatten()

    def reduce_segment(self, rows: Tensor, attention: Tensor, quota: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same for one segment, `[m, n]` each; tokens are counted from its first."""
        (frames, size), flat = attention.shape, rows.float().flatten(0, 1)
        token, salient = torch.arange(len(flat), device=rows.device), (quota.double() * self.salient).ceil().long()
        value = attention * (flat @ flat.mean(0)).view_as(attention) if self.relevance else attention
        order = max_min(rows, max(1, int(salient.max())), value)  # in each frame the first ones are salient
        unused = torch.arange(order.shape[1], device=rows.device) >= salient[:, None]
        free = torch.ones_like(attention, dtype=torch.bool).scatter(1, order, unused)
        cosine, previous = nearest_in_previous(rows, free)
        ranked, limit = cosine.flatten(), len(token) - int(quota.sum())
        follows = ranked > self.follow
        limit -= self.official and int(follows.sum()) > limit
        follows &= ranked.argsort(descending=True, stable=True).argsort() < limit
        root = parent = previous.flatten().where(follows, token)
        for _ in range(frames.bit_length()):  # each round doubles the steps back in time
            root = root[root]
        members = sizes_of(parent if self.official else root, len(flat))  # a root is its own parent
        trees = torch.zeros_like(flat).index_add(0, root, flat) / members.clamp(min=1)[:, None]
        leads = (root == token).view_as(free) & free
        counts, few = leads.sum(-1), int((quota - salient).sum())
        if self.official:
            clusters = (counts.double() * min(1.0, few / max(1, int(counts.sum())))).ceil().long()
        else:
            clusters = in_proportion(few, counts)
        into, weight = token.where(~free.flatten(), -1), (~free).flatten().float()
        for frame, number in enumerate(clusters.tolist()):
            if number:
                places = leads[frame].nonzero().squeeze(-1) + frame * size
                centres, cluster = density_peaks(trees[places], number, min(number, 7))
                into[places], weight[places] = places[centres[cluster]], cluster_weights(cluster, centres, 0)
        return into[root].view_as(free), (weight[root] / members[root]).view_as(free)
