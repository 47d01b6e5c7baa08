"""TopV: keep the tokens with most mass in an optimal transport between the states of a layer."""

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

NEEDS = DecoderNeeds(grid=True, layer_input=True, mlp_input=True)
NO_GRID = (
    "this method goes by coordinates on one grid, which an image that is seen in several tiles does not have: take a "
    "method that needs no grid"
)


@register("topv", paper="arXiv:2503.18278", stage="decoder", needs=NEEDS)
@dataclass(frozen=True)
class TopV(DecoderMethod):
    """Keep the tokens that send most mass in the optimal transport from a layer's input to its MLP input.

    A share of the budget goes to tokens at equal stride among the others. The cost from token i to token j is
    ``feature * |s_i - t_j|^2 + near * (1 - exp(-d_ij^2 / 2 sigma^2)) + central * d_i``, each term scaled to [0, 1]: s
    are the states entering layer ``layer - 1``, t those entering its MLP, d_ij distances on the grid, d_i those to its
    centre. No attention is read; cost and plan are `[N, N]`.

    Args:
        keep: tokens per image from layer ``layer`` on, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all layers.
        layer: the first layer that receives the shorter sequence.
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
        recovered = int(self.recovered * image.budget)
        best = top_k(scores, image.budget - recovered)
        # a stable sort of "not among the best" lists the other tokens in raster order
        others = torch.ones_like(scores).scatter(-1, best, 0).argsort(dim=-1, descending=True, stable=True)
        places = uniform(image.total - best.shape[-1], recovered, scores.device)
        return image.keep(torch.cat([best, others[:, places]], -1), scores)

    def cost(self, image: DecoderTokens) -> Tensor:
        """Return the cost from each token as source to each token as target, `[B, N, N]`."""
        if image.coordinates is None:
            raise Refusal(NO_GRID)
        coordinates = image.coordinates.float()
        distance = torch.cdist(coordinates, coordinates).square()
        centre = (coordinates.amax(1, keepdim=True) + coordinates.amin(1, keepdim=True)) / 2
        feature = torch.cdist(given(image.layer_input).float(), given(image.mlp_input).float()).square()
        near = 1 - (-distance / (2 * self.sigma**2)).exp()
        central = (coordinates - centre).norm(dim=-1)[..., None]  # [B, N, 1]: the same for every target
        return self.feature * _scaled(feature) + self.near * _scaled(near) + self.central * _scaled(central)


def _scaled(term: Tensor) -> Tensor:
    """Scale each image's term to [0, 1]; a constant term becomes 0."""
    low, high = term.amin((-1, -2), keepdim=True), term.amax((-1, -2), keepdim=True)
    return (term - low) / (high - low).clamp(min=1e-12)
