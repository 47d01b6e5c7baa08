"""FoPru: focal pruning, by the attention that each patch receives in the encoder."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import Needs, ScoreMethod, register
from tokensieve.ops import rank_in_group
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens


@register("fopru", paper="arXiv:2411.14164", needs=Needs(attention_received=-2))
@dataclass(frozen=True)
class FoPru(ScoreMethod):
    """Keep the patches that receive most attention from all others, or the rows of the image that do.

    Args:
        keep: tokens per image, or a share of them.
        select: "rank" keeps the best tokens; "row" keeps whole rows of the grid, those of the largest sums, and what
            is left of the budget goes to the best tokens of the next row.

    Cost: O(N²·D) time: every row of one layer's attention, 1,024 at a time; O(N·min(N, 1,024)) extra memory per head.
    Paper: "FoPru: Focal Pruning for Efficient Large Vision-Language Models", 2024.
    Official code: none is public: which layer's attention counts (here: the one that the features come from, mean over
    heads, [CLS] as a query too) is our reading.
    """

    keep: Budget = 0.25
    select: Literal["rank", "row"] = "rank"

    @property
    def needs(self) -> Needs:
        return Needs(attention_received=-2, grid=self.select == "row")

    @property
    def by_score(self) -> bool:
        return self.select == "rank"

    def score(self, image: ConnectorTokens) -> Tensor:
        return image.attention_received[-2]

    def reduce(self, image: ConnectorTokens) -> Reduction:
        if self.by_score:
            return super().reduce(image)
        scores = self.score(image)
        if image.grid is None:
            raise Refusal(f"fopru(select='row') needs tokens on a grid; these {image.total} tokens have none")
        height, width = image.grid
        order = scores.view(-1, height, width).sum(-1).sort(dim=-1, descending=True, stable=True).indices
        row = order.argsort(-1).repeat_interleave(width, -1)
        place = row * width + rank_in_group(scores, row, height)
        return image.keep(place.argsort(-1)[:, : image.budget], scores)
