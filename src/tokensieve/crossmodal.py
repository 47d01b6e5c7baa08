"""Inputs and decisions of fusion methods: the text stream and the image stream in a layer of a cross-modal encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.ops import bipartite_match, first_of_each


@dataclass(frozen=True, eq=False)
class ModalityStream:
    """The tokens of one modality at one layer.

    Attributes:
        mask: `[B, N]` float32, 1 on tokens and 0 on padding; in between if a merge averaged both.
        counts: number of tokens per row, known without a device sync.
        size: `[B, N]` float32, original tokens that each token represents; ``None`` if the method does not need it.
    """

    mask: Tensor
    counts: tuple[int, ...]
    size: Tensor | None = None

    def reduced(self, merge: Merge, *, average: bool) -> ModalityStream:
        """Return the stream after ``merge``. ``average`` averages the mask as the tokens; else all slots get 1."""
        valid = first_of_each(merge.counts, merge.anchors).float()
        mask = merge.apply(self.mask[..., None]).squeeze(-1) * valid if average else valid
        return ModalityStream(mask, merge.counts, None if self.size is None else merge.sizes(self.size))

    @property
    def ragged(self) -> bool:
        """Return whether a row has padding."""
        return min(self.counts) < self.mask.shape[1]


@dataclass(frozen=True, eq=False)
class CrossModal:
    """The evidence of one layer with H heads of width d, T text tokens and I image tokens.

    Attributes:
        text, image: the streams that enter the layer.
        query: `[B, H, T, d]`, queries of the text.
        key: `[B, H, N, d]`, keys that the text attends to; the image's keys are last.
        bias: additive mask of this attention, broadcastable to `[B, H, T, N]`; ``None`` if nothing is masked.
        text_key: `[B, H, T, d]`, self-attention keys of the text.
        image_key: `[B, H, I, d]`, keys of the image.
    """

    text: ModalityStream
    image: ModalityStream
    query: Tensor
    key: Tensor
    bias: Tensor | None
    text_key: Tensor
    image_key: Tensor

    @property
    def one_stream(self) -> bool:
        """Return whether text and image are one sequence (ViLT); else two streams with co-attention."""
        return self.key.shape[2] > self.image_key.shape[2]


@dataclass(frozen=True, eq=False)
class Merge:
    """One decision about one stream: K slots, each anchored at a token, and R tokens that merge into a slot.

    Attributes:
        total: N, the number of tokens before the merge.
        anchors: `[B, K]`, the token at which each slot is anchored.
        counts: number of valid slots per row; the others are padding.
        source, slot: `[B, R]`, the tokens that merge and the slots that they merge into.
        joins: `[B, R]` float32, 1 on valid pairs and 0 on padding.
    """

    total: int
    anchors: Tensor
    counts: tuple[int, ...]
    source: Tensor
    slot: Tensor
    joins: Tensor

    @classmethod
    def of(
        cls, kept: Tensor, counts: Sequence[int], metric: Tensor, merges: Sequence[int], *, in_place: bool = True
    ) -> Merge:
        """Keep the first ``counts[b]`` tokens of each row of ``kept`` `[B, K]`, then merge the most similar pairs.

        Args:
            metric: `[B, N, D]`, the features that similarity is measured on, for all tokens.
            merges: pairs to merge in each row.
            in_place: slots are in the order of ``kept``; False moves even places before odd ones, as in PuMer's code.
        """
        valid = first_of_each(counts, kept)
        source, target, joins = bipartite_match(_rows(metric, kept), merges, valid)  # places in `kept`
        dropped = ~valid | torch.zeros_like(valid).scatter(1, source, joins)
        width = kept.shape[1]
        place = torch.arange(width, device=kept.device).expand_as(kept)
        place = place if in_place or not max(merges) else place + place % 2 * width
        order = place.masked_fill(dropped, 2 * width).argsort(dim=1, stable=True)  # dropped tokens sort last
        slots = tuple(n - r for n, r in zip(counts, merges, strict=True))
        slot = order.argsort(dim=1).gather(1, target)  # argsort inverts the order: the slot of each place
        # padding among the pairs may point at any place: clamp it to a slot that exists
        slot = slot.clamp(max=max(slots) - 1)
        anchors, source = kept.gather(1, order[:, : max(slots)]), kept.gather(1, source)
        return cls(metric.shape[1], anchors, slots, source, slot, joins.float())

    def apply(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Average the members of each slot, `[B, N, D]` to `[B, K, D]`, weighted by ``weight`` `[B, N]` if given."""
        kept, joined = _rows(rows, self.anchors), _rows(rows, self.source)
        kept_weight, joined_weight = self._weights(weight)
        joined = joined * joined_weight[..., None].to(rows.dtype)
        summed = (kept * kept_weight[..., None].to(rows.dtype)).scatter_add(1, _wide(self.slot, joined), joined)
        return summed / self.sizes(weight)[..., None].to(rows.dtype)

    def sizes(self, weight: Tensor | None = None) -> Tensor:
        """Sum the weights of each slot's members (1 each by default), `[B, K]` float32."""
        kept_weight, joined_weight = self._weights(weight)
        return kept_weight.scatter_add(1, self.slot, joined_weight)

    def destinations(self) -> Tensor:
        """Return the slot of each token, −1 if dropped, `[B, N]`."""
        slots = torch.arange(self.anchors.shape[1], device=self.anchors.device).expand_as(self.anchors)
        # padding among slots and pairs repeats indices: the larger value (a valid slot, not −1) must win
        slots = slots.masked_fill(~first_of_each(self.counts, slots), -1)
        slot_of = slots.new_full((len(slots), self.total), -1).scatter_reduce(1, self.anchors, slots, "amax")
        return slot_of.scatter_reduce(1, self.source, self.slot.masked_fill(self.joins == 0, -1), "amax")

    def _weights(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if weight is None:
            return torch.ones_like(self.anchors, dtype=torch.float32), self.joins
        return weight.gather(1, self.anchors), self.joins * weight.gather(1, self.source)


def _rows(rows: Tensor, index: Tensor) -> Tensor:
    """Select rows, `[B, N, D]` and `[B, K]` to `[B, K, D]`."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand_as(like)
