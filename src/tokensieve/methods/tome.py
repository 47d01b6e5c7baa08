"""ToMe: in every layer of the vision tower, the most similar tokens become one."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from tokensieve.budget import Budget, count
from tokensieve.methods.base import EncoderMethod, Needs
from tokensieve.methods.registry import register
from tokensieve.ops import alternate_match
from tokensieve.reduction import Mixing, Reduction
from tokensieve.tokens import VisualTokens


@register("tome", paper="arXiv:2210.09461", stage="encoder", needs=Needs(encoder_keys=-1))
@dataclass(frozen=True)
class ToMe(EncoderMethod):
    """In each layer of the vision tower, merge the tokens whose keys are most alike: later layers are shorter.

    Between attention and MLP every second token looks for that of the others whose key, mean over heads, is nearest;
    the most similar pairs become their mean, weighted by the patches that each side stands for.

    Args:
        keep: tokens per image at the end, or a share; equally many leave in each layer, at most half of them.
        r: instead of ``keep``, how many leave in each layer.
        inflection: from −1 (all merging early) over 0 (the same in every layer) to 1 (late).
        prop_attn: attend to a merged token as to the patches it stands for: the log of its size is added.
        official_order: the next layer pairs tokens in the order in which the authors' code leaves them (first those
            that looked for a partner and did not merge); else in raster order.

    Paper: "Token Merging: Your ViT But Faster", 2022.
    """

    keep: Budget = 0.25
    r: int | None = None
    inflection: float = 0.0
    prop_attn: bool = True
    official_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and (not isinstance(self.r, int) or self.r < 0):
            raise ValueError(f"r must be a whole number >= 0; got {self.r!r}")
        if not -1 <= self.inflection <= 1:
            raise ValueError(f"inflection must be in [-1, 1]; got {self.inflection!r}")

    @property
    def proportional(self) -> bool:
        return self.prop_attn

    def stages(self, depth: int) -> list[int]:
        return list(range(depth))

    def per_stage(self, total: int, stages: int) -> list[int]:
        if self.r is not None:
            left = [total]
            for r in ramp(self.r, int(self.r * (1 - self.inflection)), stages):
                left.append(left[-1] - min(int(r), left[-1] // 2))
            return left[1:]
        gone = total - count(self.keep, total)
        leave = ramp(gone / stages, gone / stages * (1 - self.inflection), stages)
        left = [total - round(n) for n in accumulate(leave)]
        for stage in reversed(range(stages - 1)):  # where a layer would have to lose more than half, more leave before
            left[stage] = min(left[stage], 2 * left[stage + 1])
        if 2 * left[0] < total:
            raise ValueError(f"{self} is out of reach: {stages} layers, which can halve {total} tokens each")
        return left

    def reduce(self, image: VisualTokens) -> Reduction:
        leave, first = image.total - self.wanted(image), image.specials % 2  # [CLS] takes part in alternating
        order, partner = alternate_match(image.at("encoder_keys", -1).mean(-2), first)
        gone, into = order[:, :leave], partner[:, :leave]
        token = torch.arange(image.total, device=order.device).expand(len(order), -1)
        if self.official_order:
            alone = order[:, leave:].sort(-1).values if image.specials else order[:, leave:]
            anchors = torch.cat([alone, token[:, 1 - first :: 2]], 1)
        else:
            anchors = (
                torch.zeros_like(token).scatter(1, gone, 1).argsort(dim=1, stable=True)[:, : token.shape[1] - leave]
            )
        target = token.scatter(1, gone, into)
        slot = torch.zeros_like(token).scatter(1, anchors, token[:, : anchors.shape[1]]).gather(1, target)
        sizes = torch.ones_like(token, dtype=torch.float32) if image.sizes is None else image.sizes
        merged = torch.zeros_like(sizes).scatter_add(1, target, sizes).gather(1, target)
        return Reduction(image.total, anchors, Mixing(slot, token, sizes / merged), notes=image.notes)


def ramp(mean: float, first: float, steps: int) -> list[float]:
    """``steps`` numbers on a line from ``first``, with this mean."""
    return [mean] if steps == 1 else [first + 2 * (mean - first) * step / (steps - 1) for step in range(steps)]
