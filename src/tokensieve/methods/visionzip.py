"""VisionZip: keep the patches that [CLS] attends to, and merge the others into a few contextual tokens."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import nearest, rows_at, set_true, sizes_of, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens

NEEDS = Needs(cls_attention=-2, encoder_keys=-2, patches=True)


@register("visionzip", paper="arXiv:2412.04467", needs=NEEDS)
@dataclass(frozen=True)
class VisionZip(Method):
    """Keep the dominant patches, those that [CLS] attends to most, and merge the others into a few contextual ones.

    The contextual tokens stand at equal stride among the others. Each other patch merges into the contextual token of
    most similar key (mean over heads).

    Args:
        keep: tokens per image, or a share of them (the paper: 192, 128 and 64 of 576).
        contextual: share of the budget that is contextual (the paper: 30 of 192, 20 of 128, 10 of 64).
        combine: "add" adds the mean of the merged patches to the contextual one, as the official code does, which makes
            it about twice as long as any token; "mean" is the mean of all of them, as in the paper.
        before_projector: merge the encoder's rows, as the official code does, or the projector's output.

    Cost: O(N·D) time for one row of attention, O(F·N·d) to compare keys of width d with F contextual ones; O(N·(D + F))
    extra memory, one layer's keys included.
    Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025.
    Official code: also passes on the encoder's [CLS] token, as one of the dominant, and puts the contextual tokens
    last; here every token is a patch and stands at its place. In halves the tokens are the same, and means are summed
    in float32 here, so that values differ by rounding. It cannot run with ``contextual=0`` (it divides by zero).
    """

    keep: Budget = 64
    contextual: float = 0.15625
    combine: Literal["add", "mean"] = "add"
    before_projector: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise Refusal(f"contextual must be a share in [0, 1); got {self.contextual}")

    @property
    def needs(self) -> Needs:
        return replace(NEEDS, patches=self.before_projector)

    def reduce(self, image: ConnectorTokens) -> Reduction:
        scores, few = image.cls_attention[-2], round(self.contextual * image.budget)
        dominant = top_k(scores, image.budget - few)
        if few == 0:
            return image.keep(dominant, scores)
        is_dominant = set_true(torch.zeros_like(scores, dtype=torch.bool), dominant)
        # a stable sort lists the other patches in raster order
        others = is_dominant.int().argsort(dim=-1, stable=True)[:, : image.total - (image.budget - few)]
        number = torch.arange(few, device=others.device)
        target = number * (others.shape[1] // few)  # the contextual tokens, as places among the others
        keys = rows_at(image.encoder_keys[-2].mean(-2), others)
        group = nearest(keys, keys[:, target]).squeeze(-1)
        group[:, target] = number  # also where two contextual tokens have equal keys
        merged = sizes_of(group, few).gather(-1, group) - int(self.combine == "add")  # "add": without the target
        weight = 1 / merged.clamp(min=1)
        if self.combine == "add":
            weight[:, target] = 1
        slot = torch.arange(image.budget - few, device=others.device).expand_as(dominant)
        return image.merge(
            torch.cat([dominant, others[:, target]], -1),
            torch.cat([slot, group + (image.budget - few)], -1),
            torch.cat([dominant, others], -1),
            torch.cat([torch.ones_like(dominant), weight], -1),
            scores=scores,
            before_projector=self.before_projector,
        )
