"""Keep the visual tokens that the user's words attend to: the half of 2409.01162 inside the LLM."""

from dataclasses import dataclass

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod, DecoderNeeds, ScoreMethod, register
from tokensieve.tokens import DecoderTokens, given

NEEDS = DecoderNeeds(user_text=True, attention="words")


@register("text-correlation", paper="arXiv:2409.01162", stage="decoder", needs=NEEDS)
@dataclass(frozen=True)
class TextCorrelation(ScoreMethod, DecoderMethod):
    """Keep the visual tokens that the user's words attend to most, mean over heads and words.

    The whole method is ``"cls-knee + text-correlation(keep=...)"``.

    Args:
        keep: tokens per image from layer ``layer`` on, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all layers.
        layer: the first layer that receives the shorter sequence.

    Cost: O(M·L·D) time and O(M·L) extra memory per head for the rows of M words over L positions.
    Paper: "Balancing Performance and Efficiency: A Multimodal Large Language Model Pruning Method based Image Text
    Interaction", 2024. It gives neither layer nor budget; it prunes text, too, which never happens here.
    Official code: none is public.
    """

    keep: Budget = 0.5
    average: Budget | None = None
    layer: int | float = 2

    def score(self, image: DecoderTokens) -> Tensor:
        mask = given(image.user_text).mask
        rows = given(image.attention).mean(1) * mask[..., None]  # [B, M, N], zero for padding
        return rows.sum(1) / mask.sum(-1, keepdim=True)
