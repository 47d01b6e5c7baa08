"""LLaVolta's operator: average neighbouring visual tokens between two layers of the LLM."""

from dataclasses import dataclass
from typing import Literal

import torch

from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, register
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens


@register("pool-decoder", paper="arXiv:2406.20092", stage="decoder")
@dataclass(frozen=True)
class PoolDecoder(DecoderMethod):
    """Average every ``stride`` visual tokens in raster order, before layer ``layer``.

    A mean stands at the position of its middle token.

    Args:
        stride: tokens per window.
        incomplete: average or drop a last window of fewer tokens; the official code drops it.
        layer: the first layer that receives the shorter sequence; a float is a share of the depth.

    Cost: O(N·D) time, O(N) extra memory; no evidence is read.
    Paper: "Efficient Large Multi-modal Models via Visual Context Compression", NeurIPS 2024.
    Official code: drops an incomplete window (``incomplete="drop"``) and averages position ids.
    """

    stride: int = 8
    incomplete: Literal["average", "drop"] = "average"
    layer: int | float = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise Refusal(f"stride must be at least 1; got {self.stride}")

    def reduce(self, image: DecoderTokens) -> Reduction:
        total, batch, device = image.total, len(image.features), image.features.device
        if self.incomplete == "drop" and total >= self.stride:
            total -= total % self.stride  # tokens from here on enter no window, which drops them
        source, start = torch.arange(total, device=device), torch.arange(0, total, self.stride, device=device)
        slot, size = source // self.stride, (total - start).clamp(max=self.stride)  # the last window may be smaller
        middle = start + (size - 1) // 2
        anchors, slot, source, weight = (part.expand(batch, -1) for part in (middle, slot, source, 1 / size[slot]))
        return image.merge(anchors, slot, source, weight)
