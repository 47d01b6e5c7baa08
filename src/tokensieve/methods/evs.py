"""EVS: what did not change since the frame before need not be seen again."""

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
    """Keep the tokens of a video that differ most from the token at their place in the frame before.

    The first frame is always kept, whole, even where the budget is smaller.

    Args:
        keep: tokens per video, or a share of them; 1 − the paper's pruning rate q.

    Cost: O(N·D) time, O(N·log N) to sort; O(N) extra memory.
    Paper: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", 2025. The paper
    compares pixels; as in vLLM, it is the cosine of visual tokens here.
    """

    keep: Budget = 0.25

    def reduce(self, image: ConnectorTokens) -> Reduction:
        frames = image.in_frames(image.features)
        before = (torch.arange(frames.shape[1], device=frames.device) - 1).clamp(min=0)
        change = (1 - same_place_cosine(frames, before)).clamp(max=2)
        change[:, 0] = 3  # more than any change
        wanted = max(image.budget, frames.shape[2])
        if wanted > image.budget:
            image = image.noted(f"the first frame is kept: {wanted} tokens, more than the budget")
        return image.keep(top_k(change.flatten(1), wanted), change.flatten(1))
