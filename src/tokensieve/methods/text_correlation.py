"""The half of 2409.01162 that acts inside the LLM: what the user's words look at stays."""

from dataclasses import dataclass

from tokensieve.budget import Budget
from tokensieve.methods.base import DecoderMethod, Needs, check_blocks
from tokensieve.methods.registry import register
from tokensieve.ops import top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("text-correlation", paper="arXiv:2409.01162", stage="decoder", needs=Needs(text=True, queries="words"))
@dataclass(frozen=True)
class TextCorrelation(DecoderMethod):
    """Keep the visual tokens that the user's words attend to most, mean over heads and words.

    The whole method is ``"cls-knee + text-correlation(keep=...)"``.

    Args:
        keep: tokens per image from block ``layer`` on, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all blocks.
        layer: the first block that sees the shorter sequence.

    Cost: O(M·L·D) time and O(M·L) extra memory per head for the rows of M words over L positions.
    Paper: "Balancing Performance and Efficiency: A Multimodal Large Language Model Pruning Method based Image Text
    Interaction", 2024. It gives neither block nor budget; it prunes text, too, which never happens here.
    Official code: none is public.
    """

    keep: Budget = 0.5
    average: Budget | None = None
    layer: int | float = 2

    def stages(self, depth: int) -> list[int]:
        return check_blocks([self.layer], depth)

    def reduce(self, image: VisualTokens) -> Reduction:
        real = image.words()[1]
        rows = image.given("queries").mean(1) * real[..., None]
        scores = rows.sum(1) / real.sum(-1, keepdim=True)
        return image.keep(top_k(scores, self.wanted(image)), scores)
