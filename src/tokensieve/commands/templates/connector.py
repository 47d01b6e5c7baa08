"""The idea in one line."""

from dataclasses import dataclass

from tokensieve import Method, Needs, Reduction, VisualTokens, register
from tokensieve.budget import Budget
from tokensieve.ops import top_k


@register("my-method", paper="arXiv:0000.00000", needs=Needs())
@dataclass(frozen=True)
class MyMethod(Method):
    """Keep the tokens with the largest norm.

    Args:
        keep: tokens per image, or a share of them.

    Cost: O(N·D) time, O(N) extra memory.
    Paper: "Title", year.
    Official code: what it does differently, and which parameter does the same.
    """

    keep: Budget = 64

    def reduce(self, image: VisualTokens) -> Reduction:
        scores = image.features.float().norm(dim=-1)  # [B, N]
        return image.keep(top_k(scores, image.count(self.keep)), scores)
