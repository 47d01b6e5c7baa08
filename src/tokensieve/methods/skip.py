"""The base of methods whose tokens skip layers of the LLM, and stand in the sequence again behind each of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from tokensieve.errors import Refusal
from tokensieve.methods.stages import DecoderMethod
from tokensieve.methods.trained import ModelShape, TrainedMethod
from tokensieve.ops import top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens, given


class Routers(nn.ModuleDict):
    """Hold one linear map D → 1 for each layer from ``first`` on; zero at the start, so that all tokens are equal.

    Args:
        first: the first layer with a router.
    """

    def __init__(self, shape: ModelShape, first: int = 1) -> None:
        super().__init__({str(layer): nn.Linear(shape.width, 1) for layer in range(first, shape.layers)})
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, rows: Tensor, layer: int) -> Tensor:
        """Return the scores `[B, N]` of the rows `[B, N, D]` that enter a layer.

        Raises:
            Refusal: if the layer has no router.
        """
        if str(layer) not in self:
            raise Refusal(f"these weights have routers for layers {', '.join(self)}; tokens skip layer {layer}")
        scores: Tensor = self[str(layer)](rows.float())[..., 0]
        return scores


@dataclass(frozen=True)
class SkipMethod(TrainedMethod, DecoderMethod):
    """Base of methods that route tokens around layers: mixture of depths.

    :meth:`reduce` keeps the tokens that take part in the running layer. All others skip it: the layer computes nothing
    for them, and its cache does not hold them. Behind the layer every token stands in the sequence again.

    A token's factor a scales what a layer adds to it. ``scales`` "mlp": a token that takes part is u + a·MLP(u) behind
    the layer, where u is its state after attention, and a token x that skips is a·x. ``scales`` "layer": a token that
    takes part is x + a·(layer(x) − x), and one that skips is x.
    """

    Net = Routers
    scales: ClassVar[Literal["mlp", "layer"]] = "mlp"

    @property
    def softens(self) -> Literal["rows", "attention"]:
        """Return "rows": tokens skip layers in training, too, so attention needs no bias."""
        return "rows"

    @abstractmethod
    def factors(self, scores: Tensor) -> Tensor:
        """Return the factor a of each token, from its score; any shape."""

    def score(self, image: DecoderTokens) -> Tensor:
        """Return the router's score of each token, `[B, N]`."""
        scores: Tensor = given(image.net)(image.features, image.layer)
        return scores

    def reduce(self, image: DecoderTokens) -> Reduction:
        scores = self.score(image)
        return image.keep(top_k(scores.detach(), image.budget), scores)

    def tokens_of_layers(self, total: int, layers: Sequence[int], depth: int) -> list[int]:
        """Return the tokens of an image of ``total`` tokens that each of the ``depth`` layers processes."""
        skipping = dict(zip(layers, self.stage_budgets(total, layers, depth) or [], strict=True))
        return [skipping.get(layer, total) for layer in range(depth)]
