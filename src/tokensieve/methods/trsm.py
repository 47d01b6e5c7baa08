"""TRSM: retrieve the visual tokens that match the prompt."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Needs, ScoreMethod, register
from tokensieve.ops import text_similarity
from tokensieve.tokens import ConnectorTokens, given


@register("trsm", paper="arXiv:2410.07278", needs=Needs(user_text=True))
@dataclass(frozen=True)
class Trsm(ScoreMethod):
    """Keep the visual tokens whose embedding is nearest to the words of the user's prompt.

    The measure is the cosine in the LLM's input space, between projected visual tokens and the embeddings of the user's
    own words (no template, no special tokens: give ``attach`` the processor, or all text after the first image counts).

    Args:
        keep: tokens per image, or a share of them. The paper compresses "by 20 %", which leaves open whether to or by;
            the default reads it as "to".
        query: "tokens" scores by the best word, "prompt" by the words' mean.

    Cost: O(N·M·D) time and O(N·M) extra memory for M words.
    Paper: "Retrieval Replace Reduction: An effective visual token reduction method via semantic match", 2024, v1.
    Official code: none is public.
    """

    keep: Budget = 0.2
    query: Literal["tokens", "prompt"] = "tokens"

    def score(self, image: ConnectorTokens) -> Tensor:
        text = given(image.user_text)
        return text_similarity(image.features, text.features, text.mask, self.query)
