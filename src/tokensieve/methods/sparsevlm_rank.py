"""SparseVLM's rule for counts: keep as many tokens as the rank of the raters' attention."""

from dataclasses import dataclass

import torch

from tokensieve.methods import DecoderMethod, register
from tokensieve.methods.raters import rater_attention
from tokensieve.methods.sparsevlm import NEEDS
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens


@register("sparsevlm-rank", paper="arXiv:2410.04417", stage="decoder", needs=NEEDS)
@dataclass(frozen=True)
class SparseVlmRank(DecoderMethod):
    """Keep ``scale * rank + bias`` of the tokens that the rater words attend to, by the rank of that attention.

    Every image keeps its own number, and no token is recycled; see ``sparsevlm`` for the raters. At full rank (as many
    directions as tokens) no token leaves.

    Args:
        scale, bias: tokens per rank, and in any case.
        layers: tokens leave before these layers; floats are shares of the depth.

    Cost: as ``sparsevlm+``, and O(M²·N) time for the singular values.
    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025.
    Official code: the rule is in early releases only.
    """

    scale: float = 1.0
    bias: float = 0.0
    layers: tuple[int | float, ...] = (0.09375, 0.21875, 0.5)

    def reduce(self, image: DecoderTokens) -> Reduction:
        attention, is_rater = rater_attention(image)
        scores = attention.sum(1) / is_rater.sum(-1, keepdim=True)
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        total, epsilon = image.total, torch.finfo(attention.dtype).eps
        # torch's default tolerance for a matrix of the raters' rows alone: max(raters, N) · epsilon
        rank = torch.linalg.matrix_rank(attention, rtol=is_rater.sum(-1).clamp(min=total) * epsilon)
        counts = (rank * self.scale + self.bias).long().clamp(1, max(total - 1, 1))
        return image.keep(order, scores, counts.masked_fill(rank == total, total))
