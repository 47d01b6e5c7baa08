"""ToMe: merge the most similar tokens in every layer of the vision encoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokensieve.budget import Budget, merge_counts, ramp
from tokensieve.errors import Refusal
from tokensieve.methods import EncoderMethod, EncoderNeeds, register
from tokensieve.ops import alternate_match
from tokensieve.reduction import Mixing, Reduction
from tokensieve.tokens import EncoderTokens, given


@register("tome", paper="arXiv:2210.09461", stage="encoder", needs=EncoderNeeds(encoder_keys=True))
@dataclass(frozen=True)
class ToMe(EncoderMethod):
    """Merge the tokens with the most similar keys in each layer of the vision encoder: later layers become shorter.

    Between attention and MLP every second token is matched with the other token of nearest key, mean over heads. The
    most similar pairs become their mean, weighted by the patches that each side stands for.

    Args:
        keep: tokens per image at the end, or a share; equally many leave in each layer, at most half of them.
        r: instead of ``keep``, the number that leaves in each layer.
        inflection: from −1 (all merging early) over 0 (the same in every layer) to 1 (late).
        prop_attn: attend to a merged token as to its number of patches: the log of its size is added.
        official_order: the next layer pairs tokens in the order in which the authors' code leaves them (first the
            matched tokens that did not merge); else in raster order.

    Cost: per layer, O(n²·D) time and O(n²) extra memory to match n tokens; later layers have fewer.
    Paper: "Token Merging: Your ViT But Faster", 2022.
    Official code: is made for image classifiers and takes ``r``, not a budget. It leaves tokens in the order of the
    matching (``official_order=True``). It can also protect a distillation token, which no encoder here has.
    """

    keep: Budget = 0.25
    r: int | None = None
    inflection: float = 0.0
    prop_attn: bool = True
    official_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and (not isinstance(self.r, int) or self.r < 0):
            raise Refusal(f"r must be a whole number >= 0; got {self.r!r}")
        if not -1 <= self.inflection <= 1:
            raise Refusal(f"inflection must be in [-1, 1]; got {self.inflection!r}")

    @property
    def proportional(self) -> bool:
        return self.prop_attn

    def layer_numbers(self, depth: int) -> list[int]:
        return list(range(depth))

    def stage_budgets(self, total: int, layers: Sequence[int], depth: int) -> list[int]:
        if self.r is None:
            return merge_counts(total, len(layers), self.keep, self.inflection)
        budgets = [total]
        for r in ramp(self.r, int(self.r * (1 - self.inflection)), len(layers)):
            budgets.append(budgets[-1] - min(int(r), budgets[-1] // 2))
        return budgets[1:]

    def reduce(self, image: EncoderTokens) -> Reduction:
        leaving, first = image.total - image.budget, image.specials % 2  # [CLS] counts in the alternation
        order, partner = alternate_match(given(image.encoder_keys).float().mean(-2), first)
        token = torch.arange(image.total, device=order.device).expand(len(order), -1)
        target = token.scatter(1, order[:, :leaving], partner[:, :leaving])  # the token that each one merges into
        anchors = (target != token).int().argsort(dim=1, stable=True)[:, : image.budget]  # staying tokens first
        if self.official_order:
            unmerged = order[:, leaving:].sort(-1).values if image.specials else order[:, leaving:]
            anchors = torch.cat([unmerged, token[:, 1 - first :: 2]], 1)
        # invert the anchors (token to slot), then read the slot of each token's target
        slot = torch.zeros_like(token).scatter(1, anchors, token[:, : anchors.shape[1]]).gather(1, target)
        sizes = torch.ones_like(token, dtype=torch.float32) if image.sizes is None else image.sizes
        merged = torch.zeros_like(sizes).scatter_add(1, target, sizes).gather(1, target)
        return Reduction(image.total, anchors, Mixing(slot, token, sizes / merged), notes=image.notes)
