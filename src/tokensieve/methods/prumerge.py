"""LLaVA-PruMerge: outliers of [CLS] attention stay, and take up what their nearest neighbours had to say."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import nearest, outliers, padded_nonzero, rows_at, set_true, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens

NEEDS = Needs(cls_attention_single_head=-1, encoder_keys=-1, patches=True)


@register("prumerge", paper="arXiv:2403.15388", needs=NEEDS)
@dataclass(frozen=True)
class PruMerge(Method):
    """Keep the patches that stand out in [CLS] attention; add their neighbours to them, and all the rest as one token.

    The attention is that of the last layer with its heads taken as a single one. Each kept patch adds those of its
    ``neighbours`` by key cosine, kept or not, times their attention; one more token is the sum of all dropped patches
    times their attention, and stands where the most attended of them stood.

    Args:
        keep: tokens per image, the extra one counted, or a share; ``None`` takes the outliers of each image (above
            the third quartile by 1.5 interquartile ranges): about 5 % of LLaVA-1.5's tokens.
        neighbours: how many each kept patch takes up.
        before_projector: merge the encoder's rows, as the official code does, or what the projector makes of them.

    Cost: O(K·N·D) time for the neighbours' key cosines; O(K·N) extra memory, and one layer's keys.
    Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025.
    Official code: keeps tokens in order of attention, the extra one last, and fails where nothing stands out; here
    tokens stand at their places, and one always stays. The weights are not normalised, there and here.
    """

    keep: Budget | None = None
    neighbours: int = 32
    before_projector: bool = True
    least: ClassVar = {"neighbours": 0}

    @property
    def needs(self) -> Needs:
        return replace(NEEDS, patches=self.before_projector)

    def chosen(self, image: ConnectorTokens, scores: Tensor) -> Tensor:
        """Which patches stay, `[B, N]` bool, besides the extra token."""
        if self.keep is None:
            return outliers(scores)
        best = top_k(scores, max(1, image.budget - 1))
        return set_true(torch.zeros_like(scores, dtype=torch.bool), best)

    def reduce(self, image: ConnectorTokens) -> Reduction:
        scores, keys = image.cls_attention_single_head[-1], image.encoder_keys[-1].flatten(-2)
        stay = self.chosen(image, scores)
        kept, real = padded_nonzero(stay) if self.keep is None else (_indices(stay), None)
        slots, sources = kept.shape[1], torch.arange(image.total, device=kept.device).expand_as(scores)
        rows = rows_at(keys, kept)
        near = nearest(rows, keys, min(self.neighbours, image.total - 1), own=kept)
        own = torch.arange(slots, device=kept.device).expand_as(kept)
        weight = scores.gather(-1, near.flatten(1)).view_as(near)
        alone = torch.ones_like(kept, dtype=torch.float32)
        if real is not None:
            weight, alone = weight * real[..., None], alone * real
        entries = [(own, kept, alone), (own.repeat_interleave(near.shape[-1], -1), near.flatten(1), weight.flatten(1))]
        if self.keep is None or image.budget > 1:
            extra = scores.masked_fill(stay, -1).argmax(-1, keepdim=True)
            entries.append((torch.full_like(sources, slots), sources, scores.masked_fill(stay, 0)))
            kept = torch.cat([kept, extra], -1)
            real = None if real is None else torch.cat([real, ~stay.all(-1, keepdim=True)], -1)
        slot, source, weight = (torch.cat(part, -1) for part in zip(*entries, strict=True))
        return image.merge(
            kept, slot, source, weight, valid=real, scores=scores, before_projector=self.before_projector
        )


def _indices(mask: Tensor) -> Tensor:
    """Where `[B, N]` bool is True, for images that keep the same number."""
    return mask.nonzero()[:, 1].view(len(mask), -1)
