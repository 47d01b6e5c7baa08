"""Keep the tokens that a small trained net ranks highest."""

from dataclasses import dataclass

from torch import Tensor, nn

from tokensieve import register
from tokensieve.budget import Budget
from tokensieve.methods import ModelShape, ScoreMethod, TrainedMethod
from tokensieve.ops import soft_top_k
from tokensieve.tokens import ConnectorTokens, given


@register("my-method", paper="arXiv:0000.00000", trained=True)
@dataclass(frozen=True)
class MyMethod(TrainedMethod, ScoreMethod):
    """Keep the tokens that a net of two layers ranks highest.

    Args:
        weights: "random", or a folder of ``tokensieve train``.
        keep: tokens per image, or a share of them.

    Cost: O(N·D·H) time, O(N·H) extra memory, with H hidden units.
    Paper: "Title", year.
    """

    weights: str = "random"
    keep: Budget = 64

    class Net(nn.Sequential):
        def __init__(self, shape: ModelShape, width: int = 32) -> None:
            super().__init__(nn.Linear(shape.width, width), nn.GELU(), nn.Linear(width, 1))

    def score(self, image: ConnectorTokens) -> Tensor:
        scores: Tensor = given(image.net)(image.features.float())[..., 0]  # [B, N]
        return scores

    def soften(self, image: ConnectorTokens) -> Tensor:
        return soft_top_k(self.score(image), image.budget)  # in training, in place of leaving
