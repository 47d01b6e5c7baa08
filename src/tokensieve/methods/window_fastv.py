"""Window FastV: rank by FastV's scores, but keep a share of every region of the image."""

from dataclasses import dataclass
from typing import ClassVar

from tokensieve.methods import DecoderNeeds, register
from tokensieve.methods.fastv import FastV
from tokensieve.ops import top_k_per_group
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens


@register("window-fastv", paper="arXiv:2502.11501", stage="decoder", needs=DecoderNeeds(attention="last"))
@dataclass(frozen=True)
class WindowFastV(FastV):
    """Keep in each of ``windows`` equal windows of the raster the tokens that the last prompt token attends to most.

    FastV alone keeps mostly the bottom of the image: the tokens nearest to the text. The budget is shared out evenly.

    Args:
        keep, average, layer: as in ``fastv``.
        windows: their number, e.g. 4: bands of a quarter of the rows each.

    Cost: as ``fastv``.
    Paper: "Token Pruning in Multimodal Large Language Models: Are We Solving the Right Problem?", ACL Findings 2025.
    """

    windows: int = 4
    least: ClassVar = {"windows": 1}
    by_score: ClassVar = False  # the best of each window, not of the image

    def reduce(self, image: DecoderTokens) -> Reduction:
        scores = self.score(image)
        return image.keep(top_k_per_group(scores, image.budget, self.windows), scores)
