"""SparseVLM: rate the visual tokens by the words that resemble the image, and recycle the dropped ones."""

from dataclasses import dataclass
from typing import ClassVar

from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod, DecoderNeeds, register
from tokensieve.methods.raters import rater_attention
from tokensieve.methods.recycling import recycle
from tokensieve.ops import top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens

NEEDS = DecoderNeeds(user_text=True, attention="words", input_embeddings=True)


@register("sparsevlm", paper="arXiv:2410.04417", stage="decoder", needs=NEEDS)
@dataclass(frozen=True)
class SparseVlm(DecoderMethod):
    """Keep the tokens that the rater words attend to most, and the means of clusters of the best others.

    A budget counts the kept tokens; the recycled ones come on top, as in the paper's tables.

    Args:
        keep: tokens per image after the last of ``layers``, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all layers (the paper's convention: 192, 128, 64 of 576).
        counts: instead of ``keep``, tokens kept at each of ``layers`` (official for 192, 128, 64: (300, 200, 110),
            (303, 110, 36), (66, 30, 17)).
        layers: tokens leave before these layers; floats are shares of the depth (the paper prunes after layers 2, 6 and
            15 of 32).
        recycle: share of the pruned tokens that is clustered.
        appended: recycled tokens stand after the kept ones, by falling density times distance of their centres, as in
            the official code; else at their centres' places.
        noise_seed: break ties of the clustering by noise of this seed, as the official code does in float32.

    Cost: per layer of ``layers``, O(M·(L + N)·D) time and O(M·L) extra memory per head for the rows of M words over L
    positions; O(R²·D) time to cluster R recycled tokens.
    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025.
    Official code: renumbers (``positions="contiguous"``), puts recycled tokens last (``appended``), and breaks ties by
    noise (``noise_seed``), which it draws in the model's precision: in bfloat16 clusters can differ. It keeps at most
    all but one token, and merges that one. Counts come from fixed tables (``counts``); the paper's adaptive count is
    ``sparsevlm-rank``. With a question of one word it has no rater and no valid score; here all words rate then. It
    takes one sample at a time.
    """

    keep: Budget = 0.1
    average: Budget | None = None
    counts: tuple[Budget, ...] | None = None
    layers: tuple[int | float, ...] = (0.09375, 0.21875, 0.5)
    recycle: float = 0.3
    appended: bool = False
    noise_seed: int | None = None
    proportions: ClassVar = ("recycle",)

    def reduce(self, image: DecoderTokens) -> Reduction:
        attention, is_rater = rater_attention(image)
        scores = attention.sum(1) / is_rater.sum(-1, keepdim=True)
        kept = top_k(scores, image.budget)
        return recycle(image, scores, kept, self.recycle, self.appended, self.noise_seed)
