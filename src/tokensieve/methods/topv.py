"""TopV: the tokens that a block can reach most cheaply carry the image."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, DecoderNeeds, register
from tokensieve.ops import sinkhorn_row_mass, top_k, uniform
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens, given

NO_GRID = (
    "this method goes by coordinates on one grid, which an image that is seen in several tiles does not have: take a "
    "method that needs no grid"
)


@register(
    "topv", paper="arXiv:2503.18278", stage="decoder", needs=DecoderNeeds(grid=True, layer_input=True, mlp_input=True)
)
@dataclass(frozen=True)
class TopV(DecoderMethod):
    """Keep what sends most in an optimal transport from a block's input to its MLP's, and some tokens at equal stride.

    The cost from token i to token j is ``feature * |s_i - t_j|^2 + near * (1 - exp(-d_ij^2 / 2 sigma^2)) + central *
    d_i``, each term scaled to [0, 1]: s are the states entering block ``layer - 1``, t those its MLP is given, d_ij
    distances on the grid, d_i those to its centre. No attention is read; cost and plan are `[N, N]`.

    Args:
        keep: tokens per image from block ``layer`` on, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all blocks.
        layer: the first block that sees the shorter sequence.
        recovered: share of the budget that goes to tokens at equal stride among the others.
        feature, near, central: weights of the cost's terms.
        sigma: in tokens.
        epsilon, steps: of the transport.

    Cost: O(N²·D) time and O(N²) extra memory for cost and plan.
    Paper: "TopV: Compatible Token Pruning with Inference Time Optimization for Fast and Low-Memory Multimodal Vision
    Language Model", CVPR 2025.
    Official code: none is public: weights, sigma, epsilon and the share recovered are not verified.
    """

    keep: Budget = 0.5
    average: Budget | None = None
    layer: int | float = 3
    recovered: float = 0.1
    feature: float = 1.0
    near: float = 1.0
    central: float = 0.01
    sigma: float = 10.0
    epsilon: float = 0.1
    steps: int = 3
    least: ClassVar = {"steps": 1}
    proportions: ClassVar = ("recovered",)

    def reduce(self, image: DecoderTokens) -> Reduction:
        scores = sinkhorn_row_mass(self.cost(image), self.epsilon, self.steps)
        wanted = image.budget
        again = int(self.recovered * wanted)
        kept = top_k(scores, wanted - again)
        others = torch.ones_like(scores).scatter(-1, kept, 0).argsort(dim=-1, descending=True, stable=True)
        places = uniform(image.total - kept.shape[-1], again, scores.device)
        return image.keep(torch.cat([kept, others[:, places]], -1), scores)

    def cost(self, image: DecoderTokens) -> Tensor:
        """`[B, N, N]`, from each token as source to each as target."""
        if image.coordinates is None:
            raise Refusal(NO_GRID)
        places = image.coordinates.float()
        apart = torch.cdist(places, places).square()
        middle = (places.amax(1, keepdim=True) + places.amin(1, keepdim=True)) / 2
        alike = torch.cdist(given(image.layer_input).float(), given(image.mlp_input).float()).square()
        near = 1 - (-apart / (2 * self.sigma**2)).exp()
        central = (places - middle).norm(dim=-1)[..., None]
        return self.feature * _scaled(alike) + self.near * _scaled(near) + self.central * _scaled(central)


def _scaled(term: Tensor) -> Tensor:
    low, high = term.amin((-1, -2), keepdim=True), term.amax((-1, -2), keepdim=True)
    return (term - low) / (high - low).clamp(min=1e-12)
