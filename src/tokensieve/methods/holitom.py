"""HoliTom, the half before the LLM: average the static places of a video, and keep the attended moving tokens."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import (
    cluster_weights,
    density_peaks,
    group_sizes,
    in_proportion,
    max_static_segments,
    merge_groups,
    same_place_cosine,
    top_k,
)
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens


@register("holitom", paper="arXiv:2505.21334", needs=Needs(attention_received=-1, video=True))
@dataclass(frozen=True)
class HoliTom(Method):
    """Average static places over segments and cluster them; keep the other tokens that receive most attention.

    A place is static in a segment if every frame's token resembles the next frame's. The video is cut into the
    segments that make most tokens redundant. The averaged static tokens are merged into density peaks.

    Args:
        keep: tokens per video, or a share of them; fewer stay if averaging leaves fewer.
        still: cosine to the next frame above which a place is static (the paper: 0.65 for a share of 0.1).
        own: smallest weight of a density peak in its merged token; the tokens that join it share the remaining weight.
        neighbours: of the density of a token, itself counted.

    Cost: all rows of one layer's attention, O(n²·D) time per frame; O(T² + T·n) to cut T frames; O(n²·D) to
    cluster static tokens.
    Paper: "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025, with the official
    default of pure attention for moving tokens. The half inside the LLM is left out.
    """

    keep: Budget = 0.25
    still: float = 0.8
    own: float = 0.6
    neighbours: int = 7
    least: ClassVar = {"neighbours": 1}
    proportions: ClassVar = ("own",)

    def reduce(self, image: ConnectorTokens) -> Reduction:
        received = image.attention_received[-1]
        clips = zip(image.in_frames(image.features), received, strict=True)
        into, weight = map(torch.stack, zip(*(self.reduce_clip(*clip, image.budget) for clip in clips), strict=True))
        return image.merge_into(into, weight, scores=received)

    def reduce_clip(self, rows: Tensor, received: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """Return the token that each token of one video merges into (−1: none), and its weight, `[N]` each."""
        following = torch.arange(1, len(rows) + 1, device=rows.device).clamp(max=len(rows) - 1)
        # the last frame has no next one: T frames have T − 1 rows
        resembles_next = same_place_cosine(rows, following)[:-1] > self.still
        segments = max_static_segments(resembles_next)
        static = [resembles_next[first : end - 1].all(0) & (end - first > 1) for first, end in segments]
        sizes = group_sizes(segments, static)
        quotas = in_proportion(min(budget, int(sizes.sum())), sizes)
        return merge_groups(rows, segments, static, quotas.tolist(), partial(self.pick, received))

    def pick(self, received: Tensor, tokens: Tensor, rows: Tensor, quota: int, static: bool) -> tuple[Tensor, Tensor]:
        """Return the member that each of ``tokens`` joins (−1: none), and its weight."""
        if static:
            centres, cluster = density_peaks(rows, quota, self.neighbours)
            return centres[cluster], cluster_weights(cluster, centres, self.own)
        kept = top_k(received[tokens], quota)
        return torch.full_like(tokens, -1).scatter(0, kept, kept), torch.ones_like(received[tokens])
