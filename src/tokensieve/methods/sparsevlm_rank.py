"""SparseVLM's rule for counts: keep as many tokens as the raters' attention has independent directions."""

from dataclasses import dataclass

import torch

from tokensieve.methods import DecoderMethod, DecoderNeeds, register
from tokensieve.methods.raters import rated
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens


@register(
    "sparsevlm-rank",
    paper="arXiv:2410.04417",
    stage="decoder",
    needs=DecoderNeeds(user_text=True, attention="words", input_embeddings=True),
)
@dataclass(frozen=True)
class SparseVlmRank(DecoderMethod):
    """Keep ``scale * rank + bias`` of what the rater words attend to, by the rank of their attention to the image.

    Every image keeps its own number, and nothing is recycled; see ``sparsevlm`` for the raters. At full rank (as many
    directions as tokens) nothing leaves.

    Args:
        scale, bias: tokens per rank, and in any case.
        layers: the stages' blocks; floats are shares of the depth.

    Cost: as ``sparsevlm+``, and O(M²·N) time for the singular values.
    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025.
    Official code: the rule is in early releases only.
    """

    scale: float = 1.0
    bias: float = 0.0
    layers: tuple[int | float, ...] = (0.09375, 0.21875, 0.5)

    def reduce(self, image: DecoderTokens) -> Reduction:
        rows, by = rated(image)
        scores = rows.sum(1) / by.sum(-1, keepdim=True)
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        total, smallest = image.total, torch.finfo(rows.dtype).eps
        rank = torch.linalg.matrix_rank(rows, rtol=by.sum(-1).clamp(min=total) * smallest)
        counts = (rank * self.scale + self.bias).long().clamp(1, max(total - 1, 1))
        return image.keep(order, scores, counts.masked_fill(rank == total, total))
