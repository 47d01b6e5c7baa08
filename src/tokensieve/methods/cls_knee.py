"""Keep the patches that resemble [CLS], up to the knee: the half of 2409.01162 before the LLM."""

from dataclasses import dataclass

from tokensieve.methods import Method, Needs, register
from tokensieve.ops import knee
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


@register("cls-knee", paper="arXiv:2409.01162", needs=Needs(cls_similarity=True))
@dataclass(frozen=True)
class ClsKnee(Method):
    """Keep the patches most similar to [CLS] in the encoder's output, up to the knee of the sorted similarities.

    Every image keeps its own number. The whole method is ``"cls-knee + text-correlation(keep=...)"``; it needs an
    encoder with a [CLS] token.

    Cost: O(N·D) time for the similarities, O(N·log N) to sort them; O(N) extra memory.
    Paper: "Balancing Performance and Efficiency: A Multimodal Large Language Model Pruning Method based Image Text
    Interaction", 2024.
    Official code: none is public; the knee is the point farthest from the chord of the curve.
    """

    def reduce(self, image: ConnectorTokens) -> Reduction:
        scores = given(image.cls_similarity).float()
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        # image b keeps the first knee(scores)[b] indices of its order
        return image.keep(order, scores, knee(scores))
