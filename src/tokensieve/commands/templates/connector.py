"""Keep the loudest tokens."""

from dataclasses import dataclass

from torch import Tensor

from tokensieve import register
from tokensieve.budget import Budget
from tokensieve.methods import ScoreMethod
from tokensieve.tokens import ConnectorTokens


@register("my-method", paper="arXiv:0000.00000")
@dataclass(frozen=True)
class MyMethod(ScoreMethod):
    """Keep the tokens with the largest norm.

    Args:
        keep: tokens per image, or a share of them.

    Cost: O(N·D) time, O(N) extra memory.
    Paper: "Title", year.
    Official code: the differences from it, and the parameter that reproduces each.
    """

    keep: Budget = 64

    def score(self, image: ConnectorTokens) -> Tensor:
        return image.features.float().square().sum(-1)  # [B, N], ranks like the norm
