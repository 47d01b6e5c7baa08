"""VTC-CLS: rank the patches by the attention of [CLS], summed over the layers of the vision encoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Needs, ScoreMethod, register
from tokensieve.tokens import ConnectorTokens

OVER_LAYERS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "max": torch.amax,
    "min": torch.amin,
}


@register("vtc-cls", paper="arXiv:2412.05819", needs=Needs(cls_attention=slice(None, -1)))
@dataclass(frozen=True)
class VtcCls(ScoreMethod):
    """Keep the patches that the encoder's [CLS] token attends to most, summed over an ensemble of layers.

    The score of a patch is the attention of [CLS] to it, mean over heads, reduced over the layers from ``first_layer``
    to the last but one: LLaVA takes its features there, and never needs the last layer.

    Args:
        keep: tokens per image, or a share of them.
        first_layer: first encoder layer of the ensemble; negative counts from the last layer, so −2 is the single
            layer that the features come from.
        over_layers: the reduction of a patch's attentions in these layers to one score ("mean" ranks like "sum").

    Cost: O(S·N·D) time for one row of attention in each of S layers; O(S·N) extra memory.
    Paper: "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", 2024.
    Official code: renumbers positions (``positions="contiguous"``). It is written for one image a call, at most 576
    patches and a ``keep`` of 2 or more, and fails or returns wrong shapes otherwise. It adds attention up in the
    model's precision: in bfloat16 single tokens can differ from those of the float32 sums here. Among equal scores its
    choice is not defined; here the first patch stays.
    """

    keep: Budget = 64
    first_layer: int = 0
    over_layers: Literal["sum", "mean", "max", "min"] = "sum"

    @property
    def needs(self) -> Needs:
        return Needs(cls_attention=slice(self.first_layer, -1))

    def score(self, image: ConnectorTokens) -> Tensor:
        rows = image.cls_attention.stack(slice(self.first_layer, -1))  # [S, B, N]
        return OVER_LAYERS[self.over_layers](rows, dim=0)
