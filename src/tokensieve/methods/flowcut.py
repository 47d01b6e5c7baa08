"""FlowCut: drop tokens step by step inside the vision encoder, by scores that add up over its layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.special import entr

from tokensieve.budget import Budget, count
from tokensieve.methods import EncoderMethod, EncoderNeeds, register
from tokensieve.ops import top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import EncoderTokens, given

NEEDS = EncoderNeeds(cls_attention=True, value_attention=True, encoder_values=True, earlier_scores=True)


@register("flowcut", paper="arXiv:2505.19536", stage="encoder", needs=NEEDS)
@dataclass(frozen=True)
class FlowCut(EncoderMethod):
    """Drop tokens after every second layer of the vision encoder, the more the more its attention is concentrated.

    In each layer a token scores (its share of the attention of [CLS] + its share of the same by values) · the L1 norm
    of its value, mean over heads. By values means the softmax of the products of values in the place of queries and
    keys. The score that counts is the mean of this one and of the one carried from the layer before.

    With n tokens in the layer, K to keep and l layers to come, (n − K) / √l · (1 − (H / ln n)²) tokens leave, rounded.
    H is the entropy of the attention of [CLS]. After the last layer but one before the features, K tokens stay.

    Args:
        keep: tokens per image at the end, or a share of them (the paper: 192, 128 and 64 of 576).
        every: tokens leave after every so many layers, counted back from the last one.

    Cost: per layer O(n·D) time; without [CLS] O(n²·D), for two kinds of attention received.
    Paper: "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", 2025.
    Official code: of a batch, every image loses as many as the image that loses most, and an attention of zero makes
    the entropy undefined. Each tile of an image leaves the encoder with half of the budget, and layer 1 of the LLM
    ranks all of these again. For Qwen2-VL it has another score, without attention by values. Neither is here.
    """

    keep: Budget = 64
    every: int = 2
    after_layer: ClassVar = True
    adaptive: ClassVar = True
    least: ClassVar = {"every": 1}

    def layer_numbers(self, depth: int) -> list[int]:
        return list(range(max(depth - 1, 1)))

    def stage_budgets(self, total: int, layers: Sequence[int], depth: int) -> list[int]:
        return [count(self.keep, total)] * len(layers)  # until the last layer, more of them stay

    def reduce(self, image: EncoderTokens) -> Reduction:
        attention, by_values = _shares(image.cls_attention), _shares(image.value_attention)
        lengths = given(image.encoder_values).float().mean(-2).abs().sum(-1)  # [B, N, H, E] to [B, N]
        scores = (attention + by_values) * lengths
        if image.earlier_scores is not None:
            scores = (image.earlier_scores + scores) / 2
        total, budget, to_come = image.total, image.budget, image.layers_to_come
        if to_come % self.every:
            return image.keep(torch.arange(total, device=scores.device).expand_as(scores), scores)
        if not to_come:
            return image.keep(top_k(scores, budget), scores)
        concentration = 1 - (entr(attention).sum(-1) / math.log(total)) ** 2  # [B]
        leaving = ((total - budget) / math.sqrt(to_come) * concentration).round().long()
        stay = (total - leaving).clamp(budget, total)
        best_first = scores.sort(descending=True, stable=True).indices
        return image.keep(best_first, scores, counts=stay)


def _shares(attention: Tensor | None) -> Tensor:
    """Scale attention `[B, N]` to a sum of 1."""
    rows = given(attention).float()
    return rows / rows.sum(-1, keepdim=True)
