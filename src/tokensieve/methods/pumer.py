"""PuMer: prune image tokens that receive little attention from the text, and merge similar ones of each modality."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokensieve.crossmodal import CrossModal, Merge
from tokensieve.errors import Refusal
from tokensieve.methods import FusionMethod, register
from tokensieve.ops import attention, epsilon_attention, keep_best, text_relevance


@register("pumer", paper="arXiv:2305.17530", stage="fusion", trained=True)
@dataclass(frozen=True)
class PuMer(FusionMethod):
    """Prune image tokens by the text's attention inside a cross-modal encoder, then merge similar tokens of each kind.

    The method acts between attention and MLP of each of ``layers``. Of M image tokens, the round(prune·M) that the text
    attends to least leave, and round(merge·M) of the others join the token of most similar key. Of T text tokens,
    round(merge_text·T) join one in the same way. A merged token is the plain average of its members. The model is meant
    to be fine-tuned with the method (``tokensieve train pumer``).

    Args:
        layers: ascending; in a two-stream encoder the pairs of co-attention layers, both counted from 0.
        prune, merge, merge_text: shares in [0, 1), of the tokens that enter the layer.
        relevance: the score of an image token: the text's attention to it, mean over heads ("mean_head") or of the
            first head ("first_head"), or the dot product of head-mean keys ("key_key") or of text queries and image
            keys ("query_key"); each summed over the words.
        weights: weight of a member in an average: "equal", or the number of original tokens it stands for ("size").
        official_order: survivors stand best first, as in the authors' code, where the best one takes the place that is
            protected from merging. Else all stand in their own order, and the first one (the image's [CLS]) stays.
        official_padding: padding counts as tokens, as in the authors' code: it is scored, merged and weighed down by a
            fractional mask, and the attention of layers and scores has their ε. For comparisons, not for speed. Else
            padding takes no part, and a row is reduced as if it were alone.
        official_rounding: shares of no token act as in the authors' code. ViLT: where round(prune·M) is 0, nothing
            merges either. METER: with ``prune=0`` nothing merges either, and where round(merge·M) is 0, no image token
            leaves. Else every share acts alone.

    Cost: per layer, O(T·L·D) time for the attention of T text tokens to L positions, O(I²·D) to match I image tokens;
    O(T·L) extra memory per head and O(I²).
    Paper: "PuMer: Pruning and Merging Tokens for Efficient Vision Language Models", 2023.
    Official code: orders survivors, counts padding and treats shares of no token as ``official_order=True``,
    ``official_padding=True`` and ``official_rounding=True`` do; patches enter ViLT in random order, here in raster
    order. It fails where tokens should merge and at most two are left; here none merge.
    """

    layers: tuple[int, ...] = (2, 5, 8)
    prune: float = 0.1
    merge: float = 0.3
    merge_text: float = 0.2
    relevance: Literal["mean_head", "first_head", "key_key", "query_key"] = "mean_head"
    weights: Literal["equal", "size"] = "equal"
    official_order: bool = False
    official_padding: bool = False
    official_rounding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prune", "merge", "merge_text"):
            share = getattr(self, name)
            if not 0 <= share < 1:
                raise Refusal(f"{name} must be a share in [0, 1); got {share!r}")

    @property
    def acts(self) -> bool:
        return any((self.prune, self.merge, self.merge_text))

    @property
    def merges_text(self) -> bool:
        return self.merge_text > 0

    @property
    def counts_padding(self) -> bool:
        return self.official_padding

    @property
    def follows_sizes(self) -> bool:
        return self.weights == "size"

    def reduce_pair(self, layer: CrossModal) -> tuple[Merge | None, Merge | None]:
        prune, merge = ([round(share * n) for n in layer.image.counts] for share in (self.prune, self.merge))
        merge_text = [round(self.merge_text * n) for n in layer.text.counts]
        if self.official_rounding:
            merging = [n > 0 if layer.one_stream else self.prune > 0 for n in prune]
            merge = [n * allowed for n, allowed in zip(merge, merging, strict=True)]
            merge_text = [n * allowed for n, allowed in zip(merge_text, merging, strict=True)]
            if not layer.one_stream:
                prune = [n if pairs else 0 for n, pairs in zip(prune, merge, strict=True)]
        return self._text(layer, merge_text), self._image(layer, prune, merge)

    def _text(self, layer: CrossModal, merge: list[int]) -> Merge | None:
        counts = layer.text.counts
        merges = _possible(merge, counts)
        if not max(merges):
            return None
        # all words stay: equal scores keep them in order, and padding ranks last unless it counts as tokens
        scores = torch.zeros_like(layer.text.mask) if self.official_padding else (layer.text.mask > 0).float()
        words, _ = keep_best(scores, counts)
        return Merge.of(words, counts, layer.text_key.mean(1), merges, in_place=not self.official_order)

    def _image(self, layer: CrossModal, prune: list[int], merge: list[int]) -> Merge | None:
        counts = layer.image.counts
        keep = tuple(max(n - pruned, 1) for n, pruned in zip(counts, prune, strict=True))
        merges = _possible(merge, keep)
        if keep == counts and not max(merges):
            return None
        scores = self._scores(layer)
        if not self.official_padding:
            scores = scores.masked_fill(layer.image.mask == 0, -torch.inf)
        if not self.official_order:
            scores[:, 0] = torch.inf  # the image's [CLS] stays
        kept, _ = keep_best(scores, keep, in_place=not self.official_order)
        return Merge.of(kept, keep, layer.image_key.mean(1), merges, in_place=not self.official_order)

    def _scores(self, layer: CrossModal) -> Tensor:
        mask = layer.text.mask
        weight = (torch.ones_like(mask) if self.official_padding else mask) / mask.sum(1, keepdim=True)
        if self.relevance in ("key_key", "query_key"):
            text = layer.text_key if self.relevance == "key_key" else layer.query
            return text_relevance(text.mean(1), layer.image_key.mean(1), weight)
        heads = slice(None) if self.relevance == "mean_head" else slice(1)
        softmax = epsilon_attention if self.official_padding else attention
        attended = softmax(layer.query[:, heads], layer.key[:, heads], layer.bias).mean(1)
        image_tokens = layer.image.mask.shape[1]  # the image comes last among the keys
        return torch.einsum("bt,bti->bi", weight, attended[..., -image_tokens:])


def _possible(merges: Sequence[int], remaining: Sequence[int]) -> list[int]:
    """Return the pairs to merge in each row: at most half of the remaining tokens but the first."""
    return [min(pairs, (n - 1) // 2) for pairs, n in zip(merges, remaining, strict=True)]
