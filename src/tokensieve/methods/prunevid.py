"""PruneVid, the half before the LLM: average static places over time, and cluster all tokens in space."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import (
    Segment,
    cluster_weights,
    density_peaks,
    group_sizes,
    in_proportion,
    mean_pairwise_cosine,
    merge_groups,
    segments_at,
)
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens


@register("prunevid", paper="arXiv:2412.16117", needs=Needs(video=True))
@dataclass(frozen=True)
class PruneVid(Method):
    """Average static places over the frames of a scene, then merge them, and each frame's other tokens, by clusters.

    Scenes are runs of frames that fall into one cluster of frames. The number of tokens that stay depends on the video.

    Args:
        keep: at most so many tokens per video, or a share of them; ``None``: as many as ``merged`` leaves.
        merged: clusters per token where there are more than 14 tokens.
        scenes: clusters of frames per frame.
        still: a place is static if the mean cosine of its tokens over the scene is larger.
        neighbours: of the density of a token or frame, itself counted.

    Cost: O(n²·D) time per frame of n tokens and per scene; O(n·min(n, 1,024)) extra memory.
    Paper: "PruneVid: Visual Token Pruning for Efficient Video Large Language Models", ACL Findings 2025. The half
    inside the LLM is left out. A merged token stands at its cluster's centre, in the first frame of the scene if it is
    static; the official code lines up a scene's static tokens before the others and renumbers.
    """

    keep: Budget | None = None
    merged: float = 0.5
    scenes: float = 0.25
    still: float = 0.8
    neighbours: int = 7
    least: ClassVar = {"neighbours": 1}
    proportions: ClassVar = ("merged", "scenes")

    def reduce(self, image: ConnectorTokens) -> Reduction:
        clips = [self.reduce_clip(rows, image.budget) for rows in image.in_frames(image.features)]
        into, weight = map(torch.stack, zip(*clips, strict=True))
        return image.merge_into(into, weight)

    def reduce_clip(self, rows: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """Return the token that each token of one video merges into, and its weight, `[N]` each."""
        frames = rows.mean(1, dtype=torch.float32)
        _, scene = density_peaks(frames, max(1, int(len(frames) * self.scenes)), self.neighbours)
        segments = segments_at(scene[1:] != scene[:-1])
        static = [self.static_places(rows, segment) for segment in segments]
        sizes = group_sizes(segments, static)
        if self.keep is None:  # small groups are not clustered
            quotas = (sizes * self.merged).long().clamp(min=1).where(sizes > 14, sizes)
        else:
            quotas = in_proportion(min(budget, int(sizes.sum())), sizes)
        return merge_groups(rows, segments, static, quotas.tolist(), self.pick)

    def static_places(self, rows: Tensor, segment: Segment) -> Tensor:
        """Return the static places of one segment, `[n]` bool; a single frame has none."""
        first, end = segment
        if end - first == 1:
            return torch.zeros_like(rows[0, :, 0], dtype=torch.bool)
        return mean_pairwise_cosine(rows[first:end]) > self.still

    def pick(self, tokens: Tensor, rows: Tensor, quota: int, static: bool) -> tuple[Tensor, Tensor]:
        centres, cluster = density_peaks(rows, quota, self.neighbours)
        return centres[cluster], cluster_weights(cluster, centres, 0)
