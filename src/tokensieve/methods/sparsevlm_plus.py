"""SparseVLM+: raters without the rotary embedding's pull towards what stands near them."""

from dataclasses import dataclass

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, DecoderNeeds, ScoreMethod, register
from tokensieve.methods.raters import raters
from tokensieve.tokens import DecoderTokens, given


@register(
    "sparsevlm+",
    paper="arXiv:2410.04417",
    stage="decoder",
    needs=DecoderNeeds(user_text=True, attention="words", input_embeddings=True, rope_gain=True),
)
@dataclass(frozen=True)
class SparseVlmPlus(ScoreMethod, DecoderMethod):
    """Keep what the rater words attend to in the heads that look at the image most, corrected for distance.

    Attention is divided by what the rotary embedding alone would make of two vectors of ones at the same places.
    Nothing is recycled.

    Args:
        keep: tokens per image after the last stage, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all blocks.
        counts: instead of ``keep``, what each stage keeps (official for 192, 128, 64: (300, 200, 118), (238, 108, 60),
            (66, 34, 20)).
        layers: the stages' blocks; floats are shares of the depth.
        heads: how many heads count, or a share of them (the official code: 14 of 32).

    Cost: per stage, O(M·(L + N)·D) time and O(M·L) extra memory per head for the rows of M words over L positions.
    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025, version
    2.0 of the official code.
    Official code: keeps 14 heads whatever their number (``heads=14``). The divisor can come near zero or below, there
    as here.
    """

    keep: Budget = 0.1
    average: Budget | None = None
    counts: tuple[Budget, ...] | None = None
    layers: tuple[int | float, ...] = (0.09375, 0.21875, 0.5)
    heads: int | float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.heads >= 1 if isinstance(self.heads, int) else 0 < self.heads <= 1):
            raise Refusal(f"heads must be a whole number of heads >= 1, or a share in (0, 1]; got {self.heads}")

    def score(self, image: DecoderTokens) -> Tensor:
        by, turned = raters(image), given(image.rope_gain)
        gravity = given(given(image.user_text).rope_gain) @ turned.transpose(-1, -2) / turned.shape[-1] ** 0.5
        rows = (given(image.attention) / gravity[:, None]).masked_fill(~by[:, None, :, None], 0)
        heads = self.heads if isinstance(self.heads, int) else max(1, round(self.heads * rows.shape[1]))
        if heads > rows.shape[1]:
            raise Refusal(f"this LLM has {rows.shape[1]} heads; got heads={heads}")
        looking = rows.sum((-1, -2)).topk(heads, -1).indices
        scores: Tensor = rows.take_along_dim(looking[..., None, None], 1).sum((1, 2))
        return scores / (heads * by.sum(-1, keepdim=True))
