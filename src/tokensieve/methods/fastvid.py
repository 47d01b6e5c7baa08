"""FastVID: keep the salient tokens of every frame, and merge the others of a segment into anchors of high density."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import changing_segments, cluster_weights, in_proportion, nearest, peak_scores, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens


@register("fastvid", paper="arXiv:2503.11187", needs=Needs(cls_attention=-1, video=True))
@dataclass(frozen=True)
class FastVid(Method):
    """Keep the most attended tokens of each frame, and merge the others of a segment into density peaks.

    Segments end where consecutive frames differ most. Anchors stand in every fourth frame from its end, or more.

    Args:
        keep: tokens per video, or a share of them (the paper: 0.25 to 0.1), the same number in each frame.
        context: share of the budget that goes to anchors.
        segments: at least so many segments.
        alike: frames whose cosine to the next is below this end a segment, too.
        every: distance of the frames with anchors.
        own: smallest weight of an anchor in its merged token; the tokens that join it share the remaining weight.

    Cost: one row of attention per frame, O(n²·D) time per frame with anchors, O(N·A·D) to join A anchors.
    Paper: "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", NeurIPS 2025. Attention and frame
    features there: SigLIP's pooling head; here: the last layer's [CLS] attention (or received), and a frame's mean.
    """

    keep: Budget = 0.25
    context: float = 0.4
    segments: int = 8
    alike: float = 0.9
    every: int = 4
    own: float = 0.6
    proportions: ClassVar = ("context", "own")

    def reduce(self, image: ConnectorTokens) -> Reduction:
        attention = image.in_frames(image.cls_attention[-1])
        clips = zip(image.in_frames(image.features), attention, strict=True)
        into, weight = map(torch.stack, zip(*(self.reduce_clip(*clip, image.budget) for clip in clips), strict=True))
        return image.merge_into(into, weight, scores=attention.flatten(1))

    def reduce_clip(self, rows: Tensor, attention: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """Return the token that each token of one video merges into (−1: none), and its weight, `[N]` each."""
        quota = in_proportion(budget, torch.full_like(attention[:, 0], attention.shape[1], dtype=torch.int64))
        context = (quota * self.context).long()
        salient = attention.sort(dim=-1, descending=True, stable=True).indices.argsort(-1) < (quota - context)[:, None]
        into = torch.arange(salient.numel(), device=rows.device).where(salient.flatten(), -1)
        weight = salient.flatten().float()
        shares = context.tolist()
        for first, end in changing_segments(rows, self.alike, self.segments):
            if few := sum(shares[first:end]):
                free = (~salient[first:end]).flatten().nonzero().squeeze(-1)  # places in the segment
                anchors, flat = self.anchors(rows[first:end], salient[first:end], few), rows[first:end].flatten(0, 1)
                cluster, centre = nearest(flat, flat[anchors])[free, 0], torch.searchsorted(free, anchors)
                # an anchor leads its own cluster, even if another anchor is an exact duplicate
                cluster[centre], place = torch.arange(few, device=rows.device), free + first * rows.shape[1]
                into[place], weight[place] = place[centre[cluster]], cluster_weights(cluster, centre, self.own)
        return into, weight

    def anchors(self, rows: Tensor, salient: Tensor, budget: int) -> Tensor:
        """Return the ``budget`` anchors of one segment as places in the segment, ascending."""
        (frames, size), room = salient.shape, salient.shape[1] - int(salient.sum(-1).amax())
        # the largest stride whose frames have room for all anchors
        stride = next((s for s in range(self.every, 1, -1) if -(-budget // -(-frames // s)) <= room), 1)
        chosen, holders = [], list(range(frames - 1, -1, -stride))
        for turn, frame in enumerate(holders):
            share = budget * (turn + 1) // len(holders) - budget * turn // len(holders)
            free = (~salient[frame]).nonzero().squeeze(-1)
            chosen.append(free[top_k(peak_scores(rows[frame, free], 4), share)] + frame * size)
        return torch.cat(chosen).sort().values
