"""SeTok, its training-free part: merge tokens of one cluster into one token."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.errors import Refusal
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import join_nearest, padded_nonzero, peak_scores, set_true, sizes_of, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


@register("setok-cluster", paper="arXiv:2406.05127", needs=Needs(patches=True, grid=True))
@dataclass(frozen=True)
class SetokCluster(Method):
    """Merge the patches into the means of clusters around density peaks, whose number depends on the image.

    A centre is a patch whose density times distance to any denser patch exceeds ``threshold``. A code of its place is
    added to each patch first, so that clusters are local in the image, too.

    Args:
        threshold: of density times distance; a smaller one leaves more tokens.
        fallback: clusters if no patch exceeds the threshold, and neighbours that density is measured by.
        before_projector: average the encoder's rows, or the projector's output.

    Cost: O(N²·D) time for distances, twice; O(N·min(N, 1,024)) extra memory.
    Paper: "Towards Semantic Equivalence of Tokenization in Multimodal LLM", ICLR 2025. The paper merges with a trained
    transformer; here the mean does.
    Official code: breaks ties of density by noise; here the earlier patch wins.
    """

    threshold: float = 0.5
    fallback: int = 64
    before_projector: bool = True
    least: ClassVar = {"fallback": 1}

    def reduce(self, image: ConnectorTokens) -> Reduction:
        if image.grid is None:
            raise Refusal(f"setok-cluster needs tokens on a grid; these {image.total} tokens have none")
        patches = given(image.patches).float()
        rows = patches + _place_code(image.grid, patches.shape[-1]).to(patches.device)
        scores = peak_scores(rows, self.fallback, by_radius=True)
        above = scores > self.threshold
        best = set_true(torch.zeros_like(above), top_k(scores, min(self.fallback, image.total)))
        # images have different numbers of centres: their rows are padded
        centres, valid = padded_nonzero(torch.where(above.any(-1, keepdim=True), above, best))
        cluster = join_nearest(rows, centres, valid)  # [B, N]
        weight = 1 / sizes_of(cluster, centres.shape[-1]).gather(-1, cluster)
        source, before = torch.arange(image.total, device=cluster.device).expand_as(cluster), self.before_projector
        return image.merge(centres, cluster, source, weight, valid=valid, scores=scores, before_projector=before)


def _place_code(grid: tuple[int, int], width: int) -> Tensor:
    """Return sines and cosines of row and column at wavelengths from 2π to 20,000π, `[N, width]`.

    First come those of the row, sine and cosine of one wavelength beside each other, as in the authors' code.
    """
    quarter = (width + 3) // 4  # sine and cosine of two coordinates
    rate = 10000 ** (-torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = torch.stack([row, column], -1).flatten(0, 1)[..., None] * rate  # [N, 2, width / 4]
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]
