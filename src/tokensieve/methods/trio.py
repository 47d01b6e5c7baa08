"""TRIO: rank the visual tokens by the gradient of the layer's own guess of the answer, without near duplicates."""

from dataclasses import dataclass
from typing import ClassVar

from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod, DecoderNeeds, register
from tokensieve.ops import normalise, suppressed
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens, given


@register("trio", paper="arXiv:2602.04657", stage="decoder", needs=DecoderNeeds(gradient=(-2, -3, -4, -5)))
@dataclass(frozen=True)
class Trio(DecoderMethod):
    """Keep the tokens that change the next layer's guess of the answer most, and that do not resemble a better one.

    Final norm and output head read guesses off the output of layer ``layer``. A token's score is the norm of the
    gradient of their cross-entropy, with the likeliest words as labels, to the state that enters the layer. In falling
    order of score, a token that is too similar to a chosen one waits until no other token is left.

    Args:
        keep: tokens per image after the last of ``layers``, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all layers.
        counts: instead of ``keep``, tokens after each of ``layers`` (official for 64 on average: (92, 54, 22)).
        layers: tokens leave before these layers; floats are shares of the depth (official: 1, 10 and 15 of 32).
        similar: the cosine from which a token waits.
        guesses: number of places at the end of the prompt where words are guessed.
        skip: places at the very end that are left out.

    Cost: per layer of ``layers``, its forward and backward, O(L·D²) time and the memory of one layer's training step
    without its weights' gradients, and N steps of O(N) for the choice, with `[N, N]` cosines.
    Paper: "TRIO: Token Reduction via Inference-Objective Guidance for Efficient Vision-Language Models", 2026. Its
    own stage before the LLM is not covered; behind one that leaves 96 tokens: ``trio(layers=(16,), keep=32)``.
    Official code: has no licence; this follows its formulas. Its shift of logits leaves out the last place, which
    guesses the answer's first word: ``skip=1``, as in its tables; ``skip=0`` reads that place. It renumbers positions
    (``positions="contiguous"``). A bound or scale that an LLM puts on its logits is not applied.
    """

    keep: Budget = 0.1
    average: Budget | None = None
    counts: tuple[Budget, ...] | None = None
    layers: tuple[int | float, ...] = (0.03125, 0.3125, 0.46875)
    similar: float = 0.8
    guesses: int = 4
    skip: int = 1
    least: ClassVar = {"guesses": 1, "skip": 0}

    @property
    def needs(self) -> DecoderNeeds:
        return DecoderNeeds(gradient=tuple(-1 - self.skip - place for place in range(self.guesses)))

    def reduce(self, image: DecoderTokens) -> Reduction:
        scores, rows = given(image.gradient).float().norm(dim=-1), normalise(image.features)
        near = rows @ rows.transpose(-1, -2) >= self.similar
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        waits = suppressed(near, order)
        return image.keep(order.gather(-1, waits.int().argsort(dim=-1, stable=True))[:, : image.budget], scores)
