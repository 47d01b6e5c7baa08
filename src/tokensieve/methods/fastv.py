"""FastV: rank the visual tokens by the attention of the last prompt token, two layers into the LLM."""

from dataclasses import dataclass

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod, DecoderNeeds, ScoreMethod, register
from tokensieve.tokens import DecoderTokens, given


@register("fastv", paper="arXiv:2403.06764", stage="decoder", needs=DecoderNeeds(attention="last"))
@dataclass(frozen=True)
class FastV(ScoreMethod, DecoderMethod):
    """Keep the visual tokens that the last prompt token attends to most in the layer before ``layer``.

    Args:
        keep: tokens per image from layer ``layer`` on, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all layers (SparseVLM's convention).
        layer: the first layer that receives the shorter sequence (the paper's K).

    Cost: O(L·D) time and O(L) extra memory per head for one row of attention over the L positions of the prompt.
    Paper: "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024.
    Official code: without a KV cache prunes again at every generated token; with one it prunes once, as here. In a
    batch, the choice of the first sample applies to all; here each sample has its own. It averages heads in the model's
    precision: in bfloat16 single tokens can differ from those of the float32 mean here. Among equal scores its choice
    is not defined; here the first token stays.
    """

    keep: Budget = 0.5
    average: Budget | None = None
    layer: int | float = 2

    def score(self, image: DecoderTokens) -> Tensor:
        return given(image.attention).mean((1, 2))  # over the heads; the one query is the last prompt token
