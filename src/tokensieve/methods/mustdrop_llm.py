"""MustDrop, the half after the vision tower: key tokens are protected, others go when no word looks at them."""

import math
from dataclasses import dataclass

from tokensieve.methods import DecoderMethod, DecoderNeeds, Method, Needs, register
from tokensieve.ops import padded_nonzero, set_true
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, DecoderTokens, given

UNPROTECTED = "no token was protected: no connector method (such as mustdrop-keys) ranked them"


@register("mustdrop-keys", paper="arXiv:2411.10803", needs=Needs(cls_attention=-1))
@dataclass(frozen=True)
class MustDropKeys(Method):
    """Keep all, and rank the tokens by what [CLS] attends to in the last layer: ``mustdrop-llm`` protects the best.

    Cost: one row of attention: O(N·D) time, O(N) extra memory per head.
    Paper: as of ``mustdrop-llm``.
    """

    def reduce(self, image: ConnectorTokens) -> Reduction:
        b, n, _ = image.features.shape
        scores = image.cls_attention[-1]
        return Reduction.identity(n, b, scores.device, grid=image.grid, notes=image.notes, scores=scores)


@register(
    "mustdrop-llm",
    paper="arXiv:2411.10803",
    stage="decoder",
    needs=DecoderNeeds(user_text=True, attention="words", connector_scores=True),
)
@dataclass(frozen=True)
class MustDropLlm(DecoderMethod):
    """Before some blocks, drop the tokens that the words ignore both together and one by one.

    How many are left is the image's own. The best by what a connector method ranked the tokens by never leave
    (``mustdrop-keys``; without such a method nothing is protected, and the notes say so).

    Args:
        layers: where; a float is a share of the depth.
        together: a token goes only if its share of the words' attention to the image is below this, in even shares of
            the tokens that entered; 0.7 is the official 0.0012 for 576 tokens.
        single: … and if no word's attention to it reaches this, in the same unit.
        protect: share of the tokens that entered the LLM which never leave.

    Cost: per stage, O(M·L·D) time and O(M·L) extra memory per head for the rows of M words over L positions.
    Paper: "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", 2024. There every
    token after the image is a word, template included. Its cache policy while decoding is not covered.
    """

    layers: tuple[int | float, ...] = (0.1, 0.22, 0.34, 0.47)
    together: float = 0.7
    single: float = 0.6
    protect: float = 0.08

    def reduce(self, image: DecoderTokens) -> Reduction:
        attention, entered = given(image.attention).float().mean(1), image.entered or image.total
        if image.user_text is not None:
            attention = attention * image.user_text.mask[..., None]
        sums = attention.sum(1)
        even = sums.sum(-1, keepdim=True) / entered
        stays = (sums >= self.together * even) | (attention.amax(1) >= self.single / entered)
        if image.connector_scores is not None:
            best = image.connector_scores.sort(dim=-1, descending=True, stable=True).indices
            stays = set_true(stays, best[:, : math.ceil(self.protect * entered)])
        else:
            image = image.noted(UNPROTECTED)
        indices, valid = padded_nonzero(set_true(stays, sums.argmax(-1, keepdim=True)))
        return image.keep(indices, sums, valid=valid)
