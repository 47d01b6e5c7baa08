"""FastV: after two blocks, the last prompt token has made up its mind about the image."""

from dataclasses import dataclass

from tokensieve.budget import Budget
from tokensieve.methods.base import DecoderMethod, Needs, check_blocks
from tokensieve.methods.registry import register
from tokensieve.ops import top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("fastv", paper="arXiv:2403.06764", stage="decoder", needs=Needs(queries="last"))
@dataclass(frozen=True)
class FastV(DecoderMethod):
    """Keep the visual tokens that the last prompt token attends to most in the block before ``layer``.

    Args:
        keep: tokens per image from block ``layer`` on, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all blocks (SparseVLM's convention).
        layer: the first block that sees the shorter sequence (the paper's K).

    Cost: O(L·D) time and O(L) extra memory per head for one row of attention over the L positions of the prompt.
    Paper: "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024.
    Official code: without a KV cache prunes again at every generated token; with one it prunes once, as here.
    """

    keep: Budget = 0.5
    average: Budget | None = None
    layer: int | float = 2

    def stages(self, depth: int) -> list[int]:
        return check_blocks([self.layer], depth)

    def reduce(self, image: VisualTokens) -> Reduction:
        scores = image.given("queries").mean((1, 2))
        return image.keep(top_k(scores, self.wanted(image)), scores)
