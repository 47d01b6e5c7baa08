"""PriorTR: rank the visual tokens by the attention that the question adds to the model's habit."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod, DecoderNeeds, ScoreMethod, register
from tokensieve.tokens import DecoderTokens, given

NEEDS = DecoderNeeds(user_text="all", attention="words", separator_attention=True)
EPSILON = 1e-10


@register("priortr", paper="arXiv:2606.24156", stage="decoder", needs=NEEDS)
@dataclass(frozen=True)
class PriorTR(ScoreMethod, DecoderMethod):
    """Keep the tokens with the largest gain of information of the question's attention over that before the question.

    The score is ``P * log(P / Q)``. P is the attention of the question's tokens to the image, Q that of the token that
    follows the image, which does not see the question; both are means over the heads and sum to 1 over the image.

    Args:
        keep: tokens per image from layer ``layer`` on, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all layers.
        layer: the first layer that receives the shorter sequence.
        query: P is the mean over "all" tokens after the last image, with the chat template (official for LLaVA-1.5),
            or the row of the "last" token (official for LLaVA-1.6 and Qwen3-VL).

    Cost: O(M·L·D) time and O(M·L) extra memory per head for the rows of M tokens over L positions; with
    ``query="last"``, of two.
    Paper: "PriorTR: Accelerating Multimodal Large Language Models with Prior-Corrected Token Reduction", ECCV 2026.
    Official code: averages heads in the model's precision and takes one prompt with one image. Its option of the
    largest head, and its variant with a second forward for Q, are not covered. In an LLM whose prompts attend in both
    directions (PaliGemma), Q does see the question.
    """

    keep: Budget = 0.333
    average: Budget | None = None
    layer: int | float = 3
    query: Literal["all", "last"] = "all"

    @property
    def needs(self) -> DecoderNeeds:
        return NEEDS if self.query == "all" else replace(NEEDS, user_text=False, attention="last")

    def score(self, image: DecoderTokens) -> Tensor:
        rows = given(image.attention).mean(1)  # [B, Q, N]
        if image.user_text is not None:
            rows = rows * image.user_text.mask[..., None]  # a sum over queries is enough: P is scaled to 1 below
        task, prior = (_share(part) for part in (rows.sum(1), given(image.separator_attention).mean(1)))
        return task * ((task + EPSILON) / (prior + EPSILON)).log()


def _share(attention: Tensor) -> Tensor:
    """Scale each image's attention `[B, N]` to a sum of 1."""
    return attention / (attention.sum(-1, keepdim=True) + EPSILON)
