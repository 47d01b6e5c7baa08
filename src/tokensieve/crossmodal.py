"""What a fusion method sees and decides: two streams, text and image, in one layer of a cross-modal encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.ops import bipartite_match, first_of_each


@dataclass(frozen=True, eq=False)
class ModalityStream:
    """The tokens of one modality at some layer.

    Attributes:
        mask: `[B, N]` float32, 1 on tokens and 0 on padding; between the two where a merge averaged both.
        counts: tokens that take part, per row, known without a look at the device.
        size: `[B, N]` float32, original tokens that each one stands for; ``None``: not followed.
    """

    mask: Tensor
    counts: tuple[int, ...]
    size: Tensor | None = None

    def reduced(self, merge: Merge, *, average: bool) -> ModalityStream:
        """The stream after ``merge``; ``average``: its mask is averaged as the tokens are, else what is left counts."""
        real = first_of_each(merge.counts, merge.anchors).float()
        mask = merge.apply(self.mask[..., None]).squeeze(-1) * real if average else real
        return ModalityStream(mask, merge.counts, None if self.size is None else merge.sizes(self.size))

    @property
    def ragged(self) -> bool:
        """Whether some row has padding."""
        return min(self.counts) < self.mask.shape[1]


@dataclass(frozen=True, eq=False)
class CrossModal:
    """One layer's evidence; heads H of width d, T text and I image tokens.

    Attributes:
        query: `[B, H, T, d]`, queries of the text.
        key: `[B, H, N, d]`, what they attend to: the image last.
        bias: additive mask of that attention, broadcastable to `[B, H, T, N]`.
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


@dataclass(frozen=True, eq=False)
class Merge:
    """One decision about one stream: K slots, each at the place of a token, and R tokens that join a slot.

    Attributes:
        total: N, the tokens before.
        anchors: `[B, K]`, the token each slot stands for.
        counts: slots that count, per row; the others are padding.
        source, slot: `[B, R]`, the tokens that join and the slots they join.
        joins: `[B, R]` float32, 1 where the pair counts.
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
        """Keep the tokens at ``kept`` `[B, K]`, of which ``counts[b]`` count, and merge the most similar of them.

        Args:
            metric: `[B, N, D]`, what similarity is measured on, for all tokens.
            merges: pairs to merge in each row.
            in_place: slots stand in the order of ``kept``; else first the proposers that stayed, then all others.
        """
        real = first_of_each(counts, kept)
        source, target, joins = bipartite_match(_rows(metric, kept), merges, real)
        gone = ~real | torch.zeros_like(real).scatter(1, source, joins)
        width = kept.shape[1]
        place = torch.arange(width, device=kept.device).expand_as(kept)
        place = place if in_place or not max(merges) else place + place % 2 * width
        order = place.masked_fill(gone, 2 * width).argsort(dim=1, stable=True)
        left = tuple(n - r for n, r in zip(counts, merges, strict=True))
        slot = order.argsort(dim=1).gather(1, target)
        # a pair that does not count may point anywhere: let it point at a slot that exists
        slot = slot.clamp(max=max(left) - 1)
        anchors, source = kept.gather(1, order[:, : max(left)]), kept.gather(1, source)
        return cls(metric.shape[1], anchors, left, source, slot, joins.float())

    def apply(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Average the members of each slot, `[B, N, D]` to `[B, K, D]`; ``weight`` `[B, N]`: what each counts."""
        stayed, joined = _rows(rows, self.anchors), _rows(rows, self.source)
        own, more = self._shares(weight)
        joined = joined * more[..., None].to(rows.dtype)
        summed = (stayed * own[..., None].to(rows.dtype)).scatter_add(1, _wide(self.slot, joined), joined)
        return summed / self.sizes(weight)[..., None].to(rows.dtype)

    def sizes(self, weight: Tensor | None = None) -> Tensor:
        """What each slot counts: the sum of its members' weights (1 each by default), `[B, K]` float32."""
        own, more = self._shares(weight)
        return own.scatter_add(1, self.slot, more)

    def destinations(self) -> Tensor:
        """Slot that each token went to, −1 if dropped: `[B, N]`."""
        slots = torch.arange(self.anchors.shape[1], device=self.anchors.device).expand_as(self.anchors)
        # rows whose slots or pairs do not count repeat indices: the larger value (a real slot) must win
        slots = slots.masked_fill(~first_of_each(self.counts, slots), -1)
        to = slots.new_full((len(slots), self.total), -1).scatter_reduce(1, self.anchors, slots, "amax")
        return to.scatter_reduce(1, self.source, self.slot.masked_fill(self.joins == 0, -1), "amax")

    def _shares(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if weight is None:
            return torch.ones_like(self.anchors, dtype=torch.float32), self.joins
        return weight.gather(1, self.anchors), self.joins * weight.gather(1, self.source)


def _rows(rows: Tensor, index: Tensor) -> Tensor:
    """`[B, N, D]` and `[B, K]` to `[B, K, D]`."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand_as(like)
