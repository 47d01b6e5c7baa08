"""Keep the tokens that the last prompt token attends to most."""

from dataclasses import dataclass

from torch import Tensor

from tokensieve import register
from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod, DecoderNeeds, ScoreMethod
from tokensieve.tokens import DecoderTokens, given


@register("my-method", paper="arXiv:0000.00000", stage="decoder", needs=DecoderNeeds(attention="last"))
@dataclass(frozen=True)
class MyMethod(ScoreMethod, DecoderMethod):
    """Keep the tokens that the last prompt token attends to most, in any head, in the layer before ``layer``.

    Args:
        keep: tokens per image from layer ``layer`` on, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all layers.
        layer: the first layer that receives the shorter sequence.

    Cost: O(L·D) time and O(L) extra memory per head for one row of attention over the L positions of the prompt.
    Paper: "Title", year.
    Official code: the differences from it, and the parameter that reproduces each.
    """

    keep: Budget = 0.5
    average: Budget | None = None
    layer: int | float = 2

    def score(self, image: DecoderTokens) -> Tensor:
        return given(image.attention).amax((1, 2))  # [B, H, 1, N] to [B, N]
