"""VTW: deep blocks do without visual tokens altogether."""

from dataclasses import dataclass

import torch

from tokensieve.methods.base import DecoderMethod, check_blocks
from tokensieve.methods.registry import register
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("vtw", paper="arXiv:2405.05803", stage="decoder")
@dataclass(frozen=True)
class Vtw(DecoderMethod):
    """Withdraw every visual token before block ``layer``: what they had to say is in the text by then.

    Args:
        layer: the first block without visual tokens; a float is a share of the depth (the paper: 15 or 16 of 32).

    Paper: "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference", AAAI 2025.
    """

    layer: int | float = 0.5

    def stages(self, depth: int) -> list[int]:
        return check_blocks([self.layer], depth)

    def reduce(self, image: VisualTokens) -> Reduction:
        return image.keep(torch.empty((len(image.features), 0), dtype=torch.int64, device=image.features.device))
