"""SparseVLM+: correct the raters' attention for the rotary embedding's preference for near tokens."""

from dataclasses import dataclass

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, DecoderNeeds, ScoreMethod, register
from tokensieve.methods.raters import raters
from tokensieve.tokens import DecoderTokens, given

NEEDS = DecoderNeeds(user_text=True, attention="words", input_embeddings=True, rope_gain=True)


@register("sparsevlm+", paper="arXiv:2410.04417", stage="decoder", needs=NEEDS)
@dataclass(frozen=True)
class SparseVlmPlus(ScoreMethod, DecoderMethod):
    """Keep the tokens that the rater words attend to in the heads with most attention to the image, by distance.

    Attention is divided by the score that the rotary embedding alone gives two vectors of ones at the same positions.
    No token is recycled.

    Args:
        keep: tokens per image after the last of ``layers``, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all layers.
        counts: instead of ``keep``, tokens kept at each of ``layers`` (official for 192, 128, 64: (300, 200, 118),
            (238, 108, 60), (66, 34, 20)).
        layers: tokens leave before these layers; floats are shares of the depth.
        heads: the number of heads that count, or a share of them (the official code: 14 of 32).

    Cost: per layer of ``layers``, O(M·(L + N)·D) time and O(M·L) extra memory per head for the rows of M words over L
    positions.
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
        is_rater, visual_gain = raters(image), given(image.rope_gain)
        text_gain = given(given(image.user_text).rope_gain)
        gain = text_gain @ visual_gain.transpose(-1, -2) / visual_gain.shape[-1] ** 0.5  # [B, M, N]
        rows = (given(image.attention) / gain[:, None]).masked_fill(~is_rater[:, None, :, None], 0)  # [B, H, M, N]
        heads = self.heads if isinstance(self.heads, int) else max(1, round(self.heads * rows.shape[1]))
        if heads > rows.shape[1]:
            raise Refusal(f"this LLM has {rows.shape[1]} heads; got heads={heads}")
        best = rows.sum((-1, -2)).topk(heads, -1).indices
        scores: Tensor = rows.take_along_dim(best[..., None, None], 1).sum((1, 2))
        return scores / (heads * is_rater.sum(-1, keepdim=True))
