"""DivPrune: keep tokens that differ from each other as much as possible."""

from dataclasses import dataclass

from tokensieve.budget import Budget
from tokensieve.methods import Method, register
from tokensieve.ops import max_min
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("divprune", paper="arXiv:2503.02175")
@dataclass(frozen=True)
class DivPrune(Method):
    """Keep, greedily, the tokens that maximise the smallest cosine distance between any two of them.

    Args:
        keep: tokens per image, or a share of them (the paper's default: 0.098 of LLaVA-1.5's 576).

    Cost: O(N²·D) time to find the first token, O(K·N·D) for the others; extra memory O(N·min(N, 1,024)).
    Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025.
    Official code: gathers distances anew at every step, O(K²·N), and renumbers positions (``positions="contiguous"``).
    In float32, without equal distances, it chooses the same tokens. It computes distances in the model's precision: in
    float16 and bfloat16 many of them are equal, and most of its choices can differ from those of the float32 distances
    here. Where rows are zero or equal it can select a token twice; here all tokens are distinct. It fails on a
    single token.
    """

    keep: Budget = 0.098

    def reduce(self, image: VisualTokens) -> Reduction:
        return image.keep(max_min(image.features, image.budget))
