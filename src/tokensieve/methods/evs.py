"""EVS: drop the tokens that did not change since the previous frame."""

from dataclasses import dataclass

import torch

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import same_place_cosine, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens


@register("evs", paper="arXiv:2510.14624", needs=Needs(video=True))
@dataclass(frozen=True)
class Evs(Method):
    """Keep the tokens of a video that differ most from the token at the same position of the previous frame.

    The first frame is always kept, whole, even where the budget is smaller.

    Args:
        keep: tokens per video, or a share of them; 1 − the paper's pruning rate q.

    Cost: O(N·D) time, O(N·log N) to sort; O(N) extra memory.
    Paper: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", 2025. The paper
    compares pixels; as in vLLM, dissimilarity is one minus the cosine of visual tokens here.
    """

    keep: Budget = 0.25

    def reduce(self, image: ConnectorTokens) -> Reduction:
        frames = image.in_frames(image.features)
        tokens_per_frame = frames.shape[2]
        previous = (torch.arange(frames.shape[1], device=frames.device) - 1).clamp(min=0)
        dissimilarity = 1 - same_place_cosine(frames, previous)  # [B, T, n]
        dissimilarity[:, 0] = 3  # above any dissimilarity, so that the first frame ranks first
        budget = max(image.budget, tokens_per_frame)
        if budget > image.budget:
            image = image.noted(f"the first frame is kept: {budget} tokens, more than the budget")
        scores = dissimilarity.flatten(1)
        return image.keep(top_k(scores, budget), scores)
