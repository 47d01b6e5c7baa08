"""HoliTom, the half before the LLM: the cut of a video in which most stands still, and attention for what moves."""

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
    """Average still places over segments, cluster them, and keep of the other tokens those that receive attention.

    The segments are those with most still tokens that all later frames can do without; a place stands still in a
    segment if every frame's token resembles the next one's. Still tokens are merged into density peaks.

    Args:
        keep: tokens per video, or a share of them; what is left after averaging may be fewer.
        still: cosine to the next frame above which a place stands still (the paper: 0.65 for a share of 0.1).
        own: smallest weight of a density peak in its merged token; the tokens that join it share the rest.
        neighbours: of the density of a token, itself counted.

    Cost: all rows of one layer's attention, O(n²·D) time per frame; O(T² + T·n) to cut T frames; O(n²·D) to
    cluster still tokens.
    Paper: "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025, with the official
    default of pure attention for what moves. The half inside the LLM is left out.
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
        decided = [self.clip(*clip, image.budget) for clip in clips]
        into, weight = (torch.stack(part) for part in zip(*decided, strict=True))
        return image.merge_into(into, weight, scores=received)

    def clip(self, rows: Tensor, received: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """Where each token of one video goes and its weight, `[N]` each."""
        after = torch.arange(1, len(rows) + 1, device=rows.device).clamp(max=len(rows) - 1)
        alike = same_place_cosine(rows, after)[:-1] > self.still
        segments = max_static_segments(alike)
        still = [alike[first : end - 1].all(0) & (end - first > 1) for first, end in segments]
        sizes = group_sizes(segments, still)
        quotas = in_proportion(min(wanted, int(sizes.sum())), sizes)
        return merge_groups(rows, segments, still, quotas.tolist(), partial(self.pick, received))

    def pick(self, received: Tensor, tokens: Tensor, rows: Tensor, quota: int, still: bool) -> tuple[Tensor, Tensor]:
        if still:
            centres, cluster = density_peaks(rows, quota, self.neighbours)
            return centres[cluster], cluster_weights(cluster, centres, self.own)
        kept = top_k(received[tokens], quota)
        return torch.full_like(tokens, -1).scatter(0, kept, kept), torch.ones_like(received[tokens])
