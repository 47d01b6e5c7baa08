"""VisionSelector: a trained scorer ranks the projected tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from tokensieve.budget import Budget
from tokensieve.methods import ModelShape, ScoreMethod, TrainedMethod, register
from tokensieve.ops import soft_top_k, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


class Scorer(nn.Module):
    """Score each row by the attention that it pays to the mean key, `[B, N, D]` to `[B, N]`."""

    def __init__(self, shape: ModelShape, width: int | None = None) -> None:
        super().__init__()
        width = width or max(shape.width // 2, 1)  # the published scorer: 1,792 of 3,584
        self.q_proj, self.k_proj = nn.Linear(shape.width, width), nn.Linear(shape.width, width)
        for layer in (self.q_proj, self.k_proj):  # near 0: with large scores, no gradient passes the soft top-K
            nn.init.normal_(layer.weight, std=1e-4)
            nn.init.zeros_(layer.bias)

    def forward(self, rows: Tensor) -> Tensor:
        query, key = self.q_proj(rows), self.k_proj(rows)
        # the mean over keys of all dot products, without the N x N matrix
        scores: Tensor = (query @ key.mean(1)[..., None])[..., 0] / query.shape[-1] ** 0.5
        return scores


@register("visionselector", paper="arXiv:2510.16598", trained=True)
@dataclass(frozen=True)
class VisionSelector(TrainedMethod, ScoreMethod):
    """Keep the tokens that a trained scorer ranks highest: the mean dot product of a token's query with all keys.

    In training, a soft top-K of the scores takes the place of leaving: sigmoid(score + t), with the t for which the
    factors sum to K. A second loss moves the factors towards 0 and 1; its weight grows from ``first`` to ``last``. The
    model stays frozen, and the scorer may be used with other budgets than that of its training.

    Args:
        weights: "bundled", "random", a folder of ``tokensieve train visionselector``, or the authors' checkpoint
            of the same model.
        keep: tokens per image, or a share of them; in training too (the paper: 0.2).
        softened: in training, factors multiply the "rows" (the paper) or each token's share in "attention". The norm at
            the start of a layer undoes the scale of a row, so that the first layers of a shallow LLM see every token.
        first, last: weight of the second loss at the beginning and at the end of training.

    Cost: O(N·D²) time, O(N·D) extra memory.
    Paper: "VisionSelector: End-to-End Learnable Visual Token Compression for Efficient Multimodal LLMs", 2025.
    Official code: computes all N² dot products and averages them, which gives the same scores up to rounding; rounds
    the budget down.
    """

    keep: Budget = 64
    softened: Literal["rows", "attention"] = "rows"
    first: float = 0.1
    last: float = 3.0

    in_training = ("softened", "first", "last")
    Net = Scorer
    published = "importance_scorer."

    def sizes_of(self, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"width": len(parameters["q_proj.weight"])}

    def names_in(self, checkpoint: Iterable[str]) -> dict[str, str]:
        names = list(checkpoint)
        # a whole model with the scorer in its vision encoder, or, as AngelSlim publishes it, the scorer alone
        alone = {name: name.removeprefix("module.").removeprefix("_orig_mod.") for name in names}
        return super().names_in(names) or (alone if "q_proj.weight" in alone.values() else {})

    @property
    def softens(self) -> Literal["rows", "attention"]:
        return self.softened

    def score(self, image: ConnectorTokens) -> Tensor:
        scores: Tensor = given(image.net)(image.features.float())
        return scores

    def soften(self, image: ConnectorTokens) -> Tensor:
        return soft_top_k(self.score(image), image.budget)

    def objective(self, decisions: Sequence[Reduction], progress: float) -> Tensor | None:
        factors = [decision.mixing.weight for decision in decisions if decision.mixing is not None]
        if not factors:  # all images have fewer tokens than the budget
            return None
        losses = [binary_cross_entropy(soft, _hard(soft)) for soft in factors]
        return (self.first + (self.last - self.first) * progress) * torch.stack(losses).mean()


def _hard(soft: Tensor) -> Tensor:
    """Return 1 for the largest factors, as many as their sum says, and 0 for the others, `[N]`."""
    kept = top_k(soft.detach(), round(float(soft.detach().sum())))
    return torch.zeros_like(soft).scatter(0, kept, 1.0)
