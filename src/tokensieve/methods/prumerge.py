"""LLaVA-PruMerge: keep the outliers of [CLS] attention, and add their nearest neighbours to them."""

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
    """Keep the patches that stand out in [CLS] attention, merge neighbours into them, and the others into one token.

    The attention is that of the last layer with all heads joined into one. Each kept patch adds its ``neighbours``
    nearest patches by key cosine, kept or not, times their attention. One extra token is the sum of all dropped patches
    times their attention; it stands at the place of the most attended of them.

    Args:
        keep: tokens per image, the extra one counted, or a share; ``None`` takes the outliers of each image (above
            the third quartile by 1.5 interquartile ranges): about 5 % of LLaVA-1.5's tokens.
        neighbours: number of patches that each kept patch adds.
        before_projector: merge the encoder's rows, as the official code does, or the projector's output.

    Cost: O(K·N·D) time for the neighbours' key cosines; O(K·N) extra memory, and one layer's keys.
    Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025.
    The paper takes neighbours among the pruned patches only, and averages by weight.
    Official code: takes neighbours among all patches and adds them without normalising the weights, as here. It orders
    kept tokens by attention and puts the extra one last, and fails where no patch stands out; here tokens stand at
    their places, and one always stays. It counts outliers over the attention of the whole batch at once, and every
    image keeps their mean number; here each image has its own quartiles and number.
    """

    keep: Budget | None = None
    neighbours: int = 32
    before_projector: bool = True
    least: ClassVar = {"neighbours": 0}

    @property
    def needs(self) -> Needs:
        return replace(NEEDS, patches=self.before_projector)

    def chosen(self, image: ConnectorTokens, scores: Tensor) -> Tensor:
        """Return the patches that stay besides the extra token, `[B, N]` bool."""
        if self.keep is None:
            return outliers(scores)
        return set_true(torch.zeros_like(scores, dtype=torch.bool), top_k(scores, max(1, image.budget - 1)))

    def reduce(self, image: ConnectorTokens) -> Reduction:
        scores, keys = image.cls_attention_single_head[-1], image.encoder_keys[-1].flatten(-2)
        stays = self.chosen(image, scores)
        kept, valid = padded_nonzero(stays)
        slots, sources = kept.shape[1], torch.arange(image.total, device=kept.device).expand_as(scores)
        near = nearest(
            rows_at(keys, kept), keys, min(self.neighbours, image.total - 1), self_index=kept
        )  # [B, K, neighbours]
        slot = torch.arange(slots, device=kept.device).expand_as(kept)
        # padded slots get entries like any other, with weight 0
        near_weight = (scores.gather(-1, near.flatten(1)).view_as(near) * valid[..., None]).flatten(1)
        entries = [
            (slot, kept, valid.float()),
            (slot.repeat_interleave(near.shape[-1], -1), near.flatten(1), near_weight),
        ]
        if self.keep is None or image.budget > 1:  # the extra token is the last slot; kept patches have weight 0 in it
            extra = scores.masked_fill(stays, -1).argmax(-1, keepdim=True)
            entries.append((torch.full_like(sources, slots), sources, scores.masked_fill(stays, 0)))
            kept = torch.cat([kept, extra], -1)
            valid = torch.cat([valid, ~stays.all(-1, keepdim=True)], -1)
        slot, source, weight = (torch.cat(part, -1) for part in zip(*entries, strict=True))
        valid_or_none = valid if self.keep is None else None
        before = self.before_projector
        return image.merge(kept, slot, source, weight, valid=valid_or_none, scores=scores, before_projector=before)
