"""ZOO-Prune: keep tokens that the projector is sensitive to and that are far from each other."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import random_scores, weighted_max_min
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


@register("zoo-prune", paper="arXiv:2509.24837", needs=Needs(patches=True, project=True))
@dataclass(frozen=True)
class ZooPrune(Method):
    """Keep, greedily, the token with the largest sensitivity times distance to the kept tokens.

    The sensitivity of a token is the change of the projector's output for small changes of its input v in random
    directions u: the mean of |P(v + h·u) − P(v − h·u)| / 2h. The distance is 1 − cosine of the projector's rows.

    This is our reading of the formula: the authors' code is not public. The directions have entries of ±1 and are the
    same for all tokens and images, and h is a share of the patches' standard deviation.

    Args:
        keep: tokens per image, or a share of them (the paper: down to 5.6 %).
        directions: number of random directions; each costs two runs of the projector.
        step: h, in standard deviations of the image's patches.
        seed: seed of the directions.

    Cost: 2·``directions`` runs of the projector on N tokens, then O(K·N·D) time; O(N·D) extra memory. No attention is
    read.
    Paper: "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models", CVPR
    2026.
    """

    keep: Budget = 64
    directions: int = 16
    step: float = 0.1
    seed: int = 0
    least: ClassVar = {"directions": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step > 0:
            raise Refusal(f"step must be above 0; got {self.step!r}")

    def reduce(self, image: ConnectorTokens) -> Reduction:
        scores = self.sensitivity(image)
        return image.keep(weighted_max_min(image.features, scores, image.budget), scores)

    @torch.no_grad()
    def sensitivity(self, image: ConnectorTokens) -> Tensor:
        """Return the mean change of the projector's output over the directions, `[B, N]`."""
        patches, project = given(image.patches), given(image.project)
        h = self.step * patches.float().std((1, 2), keepdim=True)
        numbers = torch.arange(self.directions, device=patches.device)
        signs = random_scores(numbers, patches.shape[-1], self.seed).sign().to(patches.dtype)  # ±1
        changes = []
        for sign in signs:
            moved = [(patches + side * h * sign).to(patches.dtype).flatten(0, 1) for side in (1, -1)]
            ahead, behind = (project(rows).float().view(*patches.shape[:2], -1) for rows in moved)
            changes.append((ahead - behind).norm(dim=-1) / (2 * h[..., 0]))
        return torch.stack(changes).mean(0)
