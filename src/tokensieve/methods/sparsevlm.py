"""SparseVLM: the words that see the image rate its tokens, and what is dropped is recycled."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod, DecoderNeeds, register
from tokensieve.methods.raters import rated
from tokensieve.ops import density_peaks, keep_and_average, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens


@register(
    "sparsevlm",
    paper="arXiv:2410.04417",
    stage="decoder",
    needs=DecoderNeeds(user_text=True, attention="words", input_embeddings=True),
)
@dataclass(frozen=True)
class SparseVlm(DecoderMethod):
    """Keep what the rater words attend to; cluster the best of the rest and keep the clusters' means.

    A budget counts the kept tokens; the recycled ones come on top, as in the paper's tables.

    Args:
        keep: tokens per image after the last stage, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all blocks (the paper's convention: 192, 128, 64 of 576).
        counts: instead of ``keep``, what each stage keeps (official for 192, 128, 64: (300, 200, 110), (303, 110, 36),
            (66, 30, 17)).
        layers: the stages' blocks; floats are shares of the depth (the paper prunes after blocks 2, 6 and 15 of 32).
        recycle: share of the pruned tokens that is clustered.
        appended: recycled tokens stand after the kept ones, as in the official code; else at their centres' places.
        noise_seed: break ties of the clustering by noise of this seed, as the official code does.

    Cost: per stage, O(M·(L + N)·D) time and O(M·L) extra memory per head for the rows of M words over L positions;
    O(R²·D) time to cluster R recycled tokens.
    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025.
    Official code: renumbers (``positions="contiguous"``), puts recycled tokens last (``appended``), breaks ties by
    noise (``noise_seed``), and keeps at most all but one token.
    """

    keep: Budget = 0.1
    average: Budget | None = None
    counts: tuple[Budget, ...] | None = None
    layers: tuple[int | float, ...] = (0.09375, 0.21875, 0.5)
    recycle: float = 0.3
    appended: bool = False
    noise_seed: int | None = None
    proportions: ClassVar = ("recycle",)

    def reduce(self, image: DecoderTokens) -> Reduction:
        rows, by = rated(image)
        scores = rows.sum(1) / by.sum(-1, keepdim=True)
        kept = top_k(scores, image.budget)
        return self.recycled(image, scores, kept) if self.recycle else image.keep(kept, scores)

    def recycled(self, image: DecoderTokens, scores: Tensor, kept: Tensor) -> Reduction:
        """The kept tokens as they are, and the means of clusters of the best pruned ones."""
        best = int(self.recycle * (image.total - kept.shape[-1])) + 1
        order = scores.scatter(-1, kept, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        sources, clusters, noise = order[:, :best], best // 10 + 1, None
        if self.noise_seed is not None:
            drawn = torch.rand(1, best, generator=torch.Generator().manual_seed(self.noise_seed))
            noise = 1e-6 * drawn.to(scores.device)
        rows = image.features.take_along_dim(sources[..., None], -2)
        centres, cluster = density_peaks(rows, clusters, clusters, noise)
        mixing = keep_and_average(kept, sources, cluster, centres, appended=self.appended)
        notes = ("means of recycled tokens stand after the kept ones: no slot is at its token's place",) * self.appended
        return image.merge(*mixing, *notes)
