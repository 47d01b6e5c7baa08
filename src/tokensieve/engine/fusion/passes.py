"""One pass of a batch through a cross-modal encoder: what is left of both streams, and what became of each token."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokensieve.crossmodal import CrossModal, Merge, ModalityStream
from tokensieve.methods import FusionMethod
from tokensieve.ops import mask_bias
from tokensieve.reduction import Mixing, Reduction


@dataclass(frozen=True, eq=False)
class StreamStep:
    """One decision about one stream, and what its tokens count in an average (``None``: the same)."""

    merge: Merge
    size: Tensor | None

    def apply(self, rows: Tensor) -> Tensor:
        """Rows of the stream before, `[B, N, D]`, to those after, `[B, K, D]`."""
        return self.merge.apply(rows, self.size)


@dataclass(eq=False)
class FusionPass:
    """State of one pass; the hosts' hooks move it on, layer by layer.

    Attributes:
        method: decides.
        text, image: the streams as they stand now; the image's may be unknown before the first reducer.
        texts, images: the decisions so far, in order.
        entered: image tokens per row that entered each layer with a reducer, so far.
    """

    method: FusionMethod
    text: ModalityStream
    image: ModalityStream
    texts: list[StreamStep] = field(default_factory=list)
    images: list[StreamStep] = field(default_factory=list)
    entered: list[tuple[int, ...]] = field(default_factory=list)

    @torch.no_grad()
    def reduce(self, seen: CrossModal) -> tuple[StreamStep | None, StreamStep | None]:
        """Decide about text and image in one layer, and move both streams on."""
        self.entered.append(self.image.counts)
        text, image = self.method.reduce_pair(seen)
        if text is not None:
            self.texts.append(StreamStep(text, self.text.size))
            self.text = self.text.reduced(text, average=True)
        if image is not None:
            self.images.append(StreamStep(image, self.image.size))
            self.image = self.image.reduced(image, average=False)
        return (None if text is None else self.texts[-1]), (None if image is None else self.images[-1])

    def bias(self, streams: tuple[ModalityStream, ...], like: Tensor, queries: int) -> Tensor | None:
        """Additive attention bias over the keys of ``streams``; ``None`` where nothing is hidden."""
        if not self.method.counts_padding and not any(stream.ragged for stream in streams):
            return None
        mask = torch.cat([stream.mask for stream in streams], 1)
        return mask_bias(mask, like.dtype, queries if self.method.counts_padding else 0)

    def tokens(self, depth: int) -> list[list[int]]:
        """For each row, the image tokens that entered each of ``depth`` layers."""
        counts, layers = [*self.entered, self.image.counts], self.method.layers
        return [[counts[bisect_left(layers, layer)][row] for layer in range(depth)] for row in range(len(counts[0]))]

    def decisions(self) -> list[Reduction]:
        """What became of each sample's image tokens, all layers together."""
        total = self.images[0].merge.total if self.images else self.image.mask.shape[1]
        batch, device = len(self.text.counts), self.text.mask.device
        slot = torch.arange(total, device=device).expand(batch, -1)
        share = torch.ones(batch, total, device=device)
        for step in self.images:
            to, merge = step.merge.destinations(), step.merge
            counted = torch.ones_like(to, dtype=torch.float32) if step.size is None else step.size
            weight = counted / merge.sizes(step.size).gather(1, to.clamp(min=0))
            alive, before = slot >= 0, slot.clamp(min=0)
            share = share * weight.gather(1, before)
            slot = torch.where(alive, to.gather(1, before), -1)
        return [_reduction(*row) for row in zip(slot, share, strict=True)]


def _reduction(slot: Tensor, share: Tensor) -> Reduction:
    """One image: where each token went `[N]` (−1: nowhere) and what it counts there; slots stand at their first."""
    source = (slot >= 0).nonzero().flatten()
    members = slot[source]
    first = torch.full((int(slot.max()) + 1,), len(slot), device=slot.device)
    first = first.scatter_reduce(0, members, source, "amin")
    anchors = first[first < len(slot)].sort().values
    if len(anchors) == len(source):
        return Reduction(len(slot), anchors)
    return Reduction(len(slot), anchors, Mixing(torch.searchsorted(anchors, first[members]), source, share[source]))
