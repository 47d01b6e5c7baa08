"""FasterVLM: rank the patches by one row of the vision encoder's attention."""

from dataclasses import dataclass

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Needs, ScoreMethod, register
from tokensieve.tokens import ConnectorTokens


@register("fastervlm", paper="arXiv:2412.01818", needs=Needs(cls_attention=-2))
@dataclass(frozen=True)
class FasterVlm(ScoreMethod):
    """Keep the patches that [CLS] attends to most in the layer that the features come from.

    Args:
        keep: tokens per image, or a share of them (the paper: 144, 58 and 29 of 576).

    Cost: O(N·D) time for one row of attention, O(N·log N) to sort it; O(N) extra memory.
    Paper: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", 2024.
    Official code: renumbers positions (``positions="contiguous"``).
    """

    keep: Budget = 144

    def score(self, image: ConnectorTokens) -> Tensor:
        return image.cls_attention[-2]
