"""VisPruner: spend half of the budget on salient tokens, half on diverse ones."""

from dataclasses import dataclass

import torch

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import bipartite_thinning, without_sinks
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


@register("vispruner", paper="arXiv:2412.01818v2", needs=Needs(cls_attention=-2, patches=True))
@dataclass(frozen=True)
class VisPruner(Method):
    """Keep the patches that [CLS] attends to most, and of the others the least similar to each other.

    The others, in order of attention, are thinned out round by round: those at even places that are most similar to one
    at an odd place leave.

    Args:
        keep: tokens per image, or a share of them.
        important: share of the budget that goes by attention.
        step: tokens that leave per round; a larger one is faster on many thousand tokens.
        sinks: share of the patches, those of largest norm, that count as attention sinks and rank last.

    Cost: O(N²·D) time for cosines (above 1,024 tokens in every round), (N − K) / ``step`` rounds at most;
    O(N·min(N, 1,024)) extra memory.
    Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", ICCV 2025.
    Official code: fails when the number of other patches is odd, and renumbers positions
    (``positions="contiguous"``).
    """

    keep: Budget = 64
    important: float = 0.5
    step: int = 8
    sinks: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.important <= 1 and 0 <= self.sinks < 1):
            raise Refusal(f"important and sinks are shares; got {self.important} and {self.sinks}")
        if self.step < 1:
            raise Refusal(f"step must be at least 1; got {self.step}")

    def reduce(self, image: ConnectorTokens) -> Reduction:
        patches, important = given(image.patches), int(image.budget * self.important)
        scores, diverse = without_sinks(image.cls_attention[-2], patches, self.sinks), image.budget - important
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        others = order[:, important:]
        if diverse:  # thinning by whole steps may leave more than the budget: the first of them stay
            others = bipartite_thinning(patches, others, diverse, self.step)
        return image.keep(torch.cat([order[:, :important], others[:, :diverse]], -1), scores)
