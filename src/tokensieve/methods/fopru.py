"""FoPru: rank the patches by the attention that they receive in the vision encoder."""

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
        select: "rank" keeps the best tokens; "row" keeps whole rows of the grid, those of the largest sums, and spends
            the remaining budget on the best tokens of the next row.

    Cost: O(N²·D) time: every row of one layer's attention, 1,024 at a time; O(N·min(N, 1,024)) extra memory per head.
    Paper: "FoPru: Focal Pruning for Efficient Large Vision-Language Models", 2024.
    Official code: none is public. The layer is our reading: the one that the features come from, mean over heads, with
    [CLS] as a query, too.
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
        if self.select == "rank":
            return super().reduce(image)
        if image.grid is None:
            raise Refusal(f"fopru(select='row') needs tokens on a grid; these {image.total} tokens have none")
        scores, (height, width) = self.score(image), image.grid
        order = scores.view(-1, height, width).sum(-1).sort(dim=-1, descending=True, stable=True).indices
        row_rank = order.argsort(-1).repeat_interleave(width, -1)  # [B, N], the rank of each token's row
        # best row first and, in a row, best token first: the budget may end inside a row
        place = row_rank * width + rank_in_group(scores, row_rank, height)
        return image.keep(place.argsort(-1)[:, : image.budget], scores)
