"""LLaVolta's operator: average neighbouring visual tokens between two blocks of the LLM."""

from dataclasses import dataclass

import torch

from tokensieve.methods.base import DecoderMethod, check_blocks
from tokensieve.methods.registry import register
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("pool-decoder", paper="arXiv:2406.20092", stage="decoder")
@dataclass(frozen=True)
class PoolDecoder(DecoderMethod):
    """Average every ``stride`` visual tokens in raster order, before block ``layer``.

    The last window takes what is left of the image (the official code drops an incomplete one), and a mean stands at
    the position of its middle token.

    Args:
        stride: tokens per window.
        layer: the first block that sees the shorter sequence; a float is a share of the depth.

    Paper: "Efficient Large Multi-modal Models via Visual Context Compression", NeurIPS 2024.
    """

    stride: int = 8
    layer: int | float = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1; got {self.stride}")

    def stages(self, depth: int) -> list[int]:
        return check_blocks([self.layer], depth)

    def reduce(self, image: VisualTokens) -> Reduction:
        total, batch = image.total, len(image.features)
        source = torch.arange(total, device=image.features.device)
        slot = source // self.stride
        start = torch.arange(0, total, self.stride, device=source.device)
        size = (total - start).clamp(max=self.stride)
        anchors, weight = start + (size - 1) // 2, 1 / size[slot]
        slot, source = slot.expand(batch, -1), source.expand(batch, -1)
        return image.merge(anchors.expand(batch, -1), slot, source, weight.expand(batch, -1))
