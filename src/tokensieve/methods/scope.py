"""SCOPE: keep tokens that are salient and that represent the others."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import CHUNK, coverage, gram, normalise, rows_at
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


@register("scope", paper="arXiv:2510.24214", needs=Needs(cls_attention=-2, patches=True))
@dataclass(frozen=True)
class Scope(Method):
    """Keep, greedily, the patch with the largest gain in coverage of all patches times the attention of [CLS] to it.

    A patch is covered by its cosine to the most similar kept patch (of the encoder's rows).

    Args:
        keep: tokens per image, or a share of them.
        alpha: exponent of the attention.
        combine: "times" multiplies gain and attention, "plus" adds them.
        heads: factor of the attention, for "plus": the official code sums over heads, so their number reproduces it; 1
            is the mean.

    Cost: O(N²·D) time for the gains of all tokens, then K lazy steps over the 16 best or more; O(N·min(N, 1,024)) extra
    memory.
    Paper: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs", NeurIPS 2025.
    Official code: sums attention over heads, which matters for "plus" only (``heads``), and renumbers positions
    (``positions="contiguous"``).
    """

    keep: Budget = 64
    alpha: float = 1.0
    combine: Literal["times", "plus"] = "times"
    heads: int = 1

    def reduce(self, image: ConnectorTokens) -> Reduction:
        rows, attention = normalise(given(image.patches)), image.cls_attention[-2]
        saliency = (attention * self.heads) ** self.alpha

        def cosines_of(index: Tensor) -> Tensor:
            return rows_at(rows, index) @ rows.transpose(-1, -2)

        # up to CHUNK tokens all cosines are held; above, rows of them are computed when they are needed
        covers = gram(rows) if image.total <= CHUNK else cosines_of
        weight, bonus = (saliency, None) if self.combine == "times" else (None, saliency)
        return image.keep(coverage(covers, saliency, image.budget, weight, bonus), attention)
