"""MustDrop, the half after the vision encoder: protect key tokens, and drop others that receive little attention."""

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
    """Keep all tokens, and rank them by the attention of [CLS] in the last layer: ``mustdrop-llm`` protects the best.

    Cost: one row of attention: O(N·D) time, O(N) extra memory per head.
    Paper: as of ``mustdrop-llm``.
    Official code: protects the best 8 %, rounded up, of the tokens that remain after ``mustdrop-encoder``, as
    ``mustdrop-llm`` does here.
    """

    def reduce(self, image: ConnectorTokens) -> Reduction:
        batch, total, _ = image.features.shape
        scores = image.cls_attention[-1]
        return Reduction.identity(total, batch, scores.device, grid=image.grid, notes=image.notes, scores=scores)


@register(
    "mustdrop-llm",
    paper="arXiv:2411.10803",
    stage="decoder",
    needs=DecoderNeeds(user_text=True, attention="words", connector_scores=True),
)
@dataclass(frozen=True)
class MustDropLlm(DecoderMethod):
    """Drop, at several layers, the tokens that receive little attention from all words together and from each word.

    Every image keeps its own number. The best tokens by the scores of a connector method never leave
    (``mustdrop-keys``; without such a method no token is protected, and a note records that).

    Args:
        layers: tokens leave before these layers; a float is a share of the depth.
        together: a token leaves only if its share of the words' attention to the image is below this. The unit is an
            even share of the tokens that entered; 0.7 is the official 0.0012 for 576 tokens.
        single: … and if no word's attention to it reaches this, in the same unit.
        protect: share of the tokens that entered the LLM which never leave.

    Cost: per layer of ``layers``, O(M·L·D) time and O(M·L) extra memory per head for the rows of M words over L
    positions.
    Paper: "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", 2024. Its policy for
    the cache while decoding is not covered.
    Official code: renumbers positions (``positions="contiguous"``). Every token after the image counts as a word there,
    template included, and the first sample decides for the whole batch. Its thresholds are shares of all attention to
    the image, set per benchmark; here their unit follows the number of tokens.
    """

    layers: tuple[int | float, ...] = (0.1, 0.22, 0.34, 0.47)
    together: float = 0.7
    single: float = 0.6
    protect: float = 0.08

    def reduce(self, image: DecoderTokens) -> Reduction:
        attention, entered = given(image.attention).float().mean(1), image.entered or image.total  # [B, M, N]
        if image.user_text is not None:
            attention = attention * image.user_text.mask[..., None]  # padding must not count as a word
        sums = attention.sum(1)
        even_share = sums.sum(-1, keepdim=True) / entered
        stays = (sums >= self.together * even_share) | (attention.amax(1) >= self.single / entered)
        if image.connector_scores is not None:
            order = image.connector_scores.sort(dim=-1, descending=True, stable=True).indices
            stays = set_true(stays, order[:, : math.ceil(self.protect * entered)])
        else:
            image = image.noted(UNPROTECTED)
        # the most attended token stays in any case, so that no image becomes empty
        indices, valid = padded_nonzero(set_true(stays, sums.argmax(-1, keepdim=True)))
        return image.keep(indices, sums, valid=valid)
