"""LLaVA-PruMerge+: add tokens at equal stride to PruMerge's, so that every part of the image is represented."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.errors import Refusal
from tokensieve.methods import register
from tokensieve.methods.prumerge import NEEDS, PruMerge
from tokensieve.ops import outliers, set_true, spread_evenly, top_k
from tokensieve.tokens import ConnectorTokens


@register("prumerge+", paper="arXiv:2403.15388", needs=NEEDS)
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """Keep PruMerge's patches and patches at equal stride: by default about 25 % of LLaVA-1.5's tokens.

    Args:
        keep: tokens per image, the extra one counted, or a share: half by attention, half at equal stride among the
            others. ``None`` takes the outliers of each image, and as dense a grid as there are outliers.
        neighbours, before_projector: as in ``prumerge``.
        top: instead of ``keep`` or outliers, patches by attention.
        stride: instead of the stride that follows from the outliers.
        offset: the first place of the grid.

    Cost: as ``prumerge``.
    Paper: as ``prumerge``.
    Official code: the fixed mode (1/8 by attention, 1/8 by grid) is ``top=72, stride=8, offset=4``, except that it
    passes on twice the patches that both choose; VTC-CLS's copy for budgets of 64, 128 and 256 is ``top=13,
    stride=11``, ``top=40, stride=6`` and ``top=95, stride=3``. No grid reaches the last patch, there and here. All else
    as ``prumerge``.
    """

    top: int | None = None
    stride: int | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and (self.top is not None or self.stride is not None):
            raise Refusal("give prumerge+ either keep, or top and stride")
        if self.stride is not None and self.stride < 1:
            raise Refusal(f"stride must be at least 1; got {self.stride}")

    def chosen(self, image: ConnectorTokens, scores: Tensor) -> Tensor:
        none = torch.zeros_like(scores, dtype=torch.bool)
        if self.keep is not None:
            patches = max(1, image.budget - 1)
            best = set_true(none, top_k(scores, (patches + 1) // 2))
            return set_true(best, spread_evenly(~best, patches // 2))
        best = outliers(scores) if self.top is None else set_true(none, top_k(scores, self.top))
        place = torch.arange(image.total, device=scores.device) - self.offset
        inverse = image.total / best.sum(-1, keepdim=True)  # one outlier in so many patches
        stride = (inverse.int() // 3).clamp(min=1) if self.stride is None else self.stride
        # the last patch is never on the grid, as in the official code
        return best | ((place % stride == 0) & (place >= 0) & (place < image.total - 1 - self.offset))
