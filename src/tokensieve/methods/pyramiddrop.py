"""PyramidDrop: drop a share of the visual tokens after every quarter of the LLM."""

from dataclasses import dataclass

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod, DecoderNeeds, ScoreMethod, register
from tokensieve.tokens import DecoderTokens, given


@register(
    "pyramiddrop", paper="arXiv:2410.17247", stage="decoder", needs=DecoderNeeds(attention="last", same_layer=True)
)
@dataclass(frozen=True)
class PyramidDrop(ScoreMethod, DecoderMethod):
    """Keep, at several layers, a fixed ratio of the tokens that the last prompt token attends to most in that layer.

    Args:
        keep: tokens per image after the last of ``layers``, or a share of those that entered the LLM (the paper:
            0.125). The numbers after the layers before it are spaced geometrically.
        average: instead of ``keep``, tokens averaged over all layers.
        counts: instead of ``keep``, tokens after each of ``layers``, e.g. (0.5, 0.25, 0.125); shares are rounded down,
            as in the official code.
        layers: tokens leave before these layers; floats are shares of the depth (the paper: 8, 16 and 24 of 32).

    Cost: per layer of ``layers``, its norm and projections once more, O(L·D²) time, and one row of attention over the L
    positions, O(L·D); O(L·D) extra memory.
    Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR
    2025.
    Official code: renumbers positions at every such layer (``positions="contiguous"``) and rounds shares down
    (``counts=(0.5, 0.25, 0.125)``).
    """

    keep: Budget = 0.125
    average: Budget | None = None
    counts: tuple[Budget, ...] | None = None
    layers: tuple[int | float, ...] = (0.25, 0.5, 0.75)

    def score(self, image: DecoderTokens) -> Tensor:
        return given(image.attention).mean((1, 2))  # over the heads; the one query is the last prompt token
