"""iLLaVA, the half inside the LLM: what is dropped leaves one token behind."""

from dataclasses import dataclass

import torch

from tokensieve.budget import Budget
from tokensieve.methods.base import DecoderMethod, Needs, check_blocks
from tokensieve.methods.registry import register
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("illava-llm", paper="arXiv:2412.06263", stage="decoder", needs=Needs(queries="last"))
@dataclass(frozen=True)
class ILlavaLlm(DecoderMethod):
    """Keep what the last prompt token attends to, and merge the others into the best of them by rank.

    Of r dropped tokens, the r + 1 least attended become one, at the place of the most attended among them.

    Args:
        keep: tokens per image from block ``layer`` on, the merged one counted, or a share.
        average: instead of ``keep``, tokens averaged over all blocks.
        layer: the first block that sees the shorter sequence; a float is a share of the depth.
        favour_attended: give the more attended tokens the larger weight, as the paper's text says; the official code
            does the opposite.

    Cost: as ``fastv``, and O(N·D) time to merge.
    Paper: "iLLaVA: An Image is Worth Fewer Than 1/3 Input Tokens in Large Multimodal Models", 2024.
    Official code: gives the less attended tokens the larger weight, as here; ``favour_attended=True`` is the paper's
    text.
    """

    keep: Budget = 0.7
    average: Budget | None = None
    layer: int | float = 0.25
    favour_attended: bool = False

    def stages(self, depth: int) -> list[int]:
        return check_blocks([self.layer], depth)

    def reduce(self, image: VisualTokens) -> Reduction:
        scores, wanted = image.given("queries").mean((1, 2)), self.wanted(image)
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        kept, merged = order[:, : wanted - 1], order[:, wanted - 1 :]
        rank = torch.arange(1, merged.shape[1] + 1, device=order.device, dtype=torch.float32)
        weight = (rank.flip(0) if self.favour_attended else rank) / rank.sum()
        anchors, places = torch.cat([kept, merged[:, :1]], -1).sort(-1)
        slot = places.argsort(-1)
        slot = torch.cat([slot[:, :-1], slot[:, -1:].expand_as(merged)], -1)
        weights = torch.cat([torch.ones_like(kept, dtype=torch.float32), weight.expand_as(merged)], -1)
        return image.merge(anchors, slot, order, weights)
