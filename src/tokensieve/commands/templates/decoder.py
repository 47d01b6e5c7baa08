"""The idea in one line."""

from dataclasses import dataclass

from tokensieve import Needs, Reduction, VisualTokens, register
from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod
from tokensieve.methods.base import check_blocks
from tokensieve.ops import top_k


@register("my-method", paper="arXiv:0000.00000", stage="decoder", needs=Needs(queries="last"))
@dataclass(frozen=True)
class MyMethod(DecoderMethod):
    """Keep the tokens that the last prompt token attends to most, in any head, in the block before ``layer``.

    Args:
        keep: tokens per image from block ``layer`` on, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all blocks.
        layer: the first block that sees the shorter sequence.

    Cost: O(L·D) time and O(L) extra memory per head for one row of attention over the L positions of the prompt.
    Paper: "Title", year.
    Official code: what it does differently, and which parameter does the same.
    """

    keep: Budget = 0.5
    average: Budget | None = None
    layer: int | float = 2

    def stages(self, depth: int) -> list[int]:
        return check_blocks([self.layer], depth)

    def reduce(self, image: VisualTokens) -> Reduction:
        scores = image.given("queries").amax((1, 2))  # [B, N]
        return image.keep(top_k(scores, self.wanted(image)), scores)
