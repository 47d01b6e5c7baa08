"""SparseVLM: the words that see the image rate its tokens, and what is dropped is recycled."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods.base import DecoderMethod, Needs, check_blocks
from tokensieve.methods.registry import register
from tokensieve.ops import density_peaks, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("sparsevlm", paper="arXiv:2410.04417", stage="decoder", needs=Needs(text=True, queries="words", entry=True))
@dataclass(frozen=True)
class SparseVlm(DecoderMethod):
    """Keep what the rater words attend to; cluster the best of the rest and keep the clusters' means.

    Raters are the words whose share in the softmax over the text, mean over the visual tokens at the LLM's entry, is
    above the mean. A budget counts the kept tokens; the recycled ones come on top, as in the paper's tables.

    Args:
        keep: tokens per image after the last stage, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all blocks (the paper's convention: 192, 128, 64 of 576).
        layers: the stages' blocks; floats are shares of the depth (the paper prunes after blocks 2, 6 and 15 of 32).
        recycle: share of the pruned tokens that is clustered.

    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025. The
    official code has fixed counts per stage, ours fall geometrically; it renumbers (``positions="contiguous"``).
    """

    keep: Budget = 0.1
    average: Budget | None = None
    layers: tuple[int | float, ...] = (0.09375, 0.21875, 0.5)
    recycle: float = 0.3

    def stages(self, depth: int) -> list[int]:
        return check_blocks(self.layers, depth)

    def reduce(self, image: VisualTokens) -> Reduction:
        raters = self.raters(image)
        rows = image.given("queries").mean(1)
        scores = (rows * raters[..., None]).sum(1) / raters.sum(-1, keepdim=True)
        kept = top_k(scores, self.wanted(image))
        return self.recycled(image, scores, kept) if self.recycle else image.keep(kept, scores)

    def raters(self, image: VisualTokens) -> Tensor:
        """Which words rate, `[B, M]` bool."""
        mask = image.words()[1]
        visual, text = image.given("entry").float(), image.given("text_entry").float()
        logits = (visual @ text.transpose(-1, -2)).masked_fill(~mask[:, None], -torch.inf)
        share = logits.softmax(-1).mean(1)
        return mask & (share > share.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True))

    def recycled(self, image: VisualTokens, scores: Tensor, kept: Tensor) -> Reduction:
        """The kept tokens as they are, and the means of clusters of the best pruned ones, at their centres' places."""
        pruned = image.total - kept.shape[-1]
        best = int(self.recycle * pruned) + 1
        clusters = best // 10 + 1
        sources = top_k(scores.scatter(-1, kept, -torch.inf), best)
        rows = image.features.take_along_dim(sources[..., None], -2)
        centres, cluster = density_peaks(rows, clusters, clusters)
        anchors, order = torch.cat([kept, sources.gather(-1, centres)], -1).sort(-1)
        slot_of = order.argsort(-1)  # where each kept token, and then each cluster, stands
        count = torch.zeros_like(centres).scatter_add(-1, cluster, torch.ones_like(cluster))
        slot = torch.cat([slot_of[:, : kept.shape[-1]], slot_of.gather(-1, cluster + kept.shape[-1])], -1)
        weight = torch.cat([torch.ones_like(kept, dtype=torch.float32), 1 / count.gather(-1, cluster)], -1)
        return image.merge(anchors, slot, torch.cat([kept, sources], -1), weight)
