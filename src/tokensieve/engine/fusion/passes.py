"""One pass of a batch through a cross-modal encoder: the current streams, and the decisions so far."""

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
    """One decision about one stream, and the weights of its tokens in an average (``None``: equal)."""

    merge: Merge
    size: Tensor | None

    def apply(self, rows: Tensor) -> Tensor:
        """Reduce rows of the stream, `[B, N, D]` to `[B, K, D]`."""
        return self.merge.apply(rows, self.size)


@dataclass(eq=False)
class FusionPass:
    """The state of one pass, which the host's hooks update layer by layer.

    Attributes:
        method: the fusion method that decides.
        text, image: the current streams; the image's may be empty before the first layer.
        texts, images: the decisions so far, in order.
        entered: image tokens per row that entered each layer of the method, so far.
    """

    method: FusionMethod
    text: ModalityStream
    image: ModalityStream
    texts: list[StreamStep] = field(default_factory=list)
    images: list[StreamStep] = field(default_factory=list)
    entered: list[tuple[int, ...]] = field(default_factory=list)

    @torch.no_grad()
    def reduce(self, evidence: CrossModal) -> tuple[StreamStep | None, StreamStep | None]:
        """Decide about text and image in one layer, and update both streams."""
        self.entered.append(self.image.counts)
        text, image = self.method.reduce_pair(evidence)
        if text is not None:
            self.texts.append(StreamStep(text, self.text.size))
            self.text = self.text.reduced(text, average=True)
        if image is not None:
            self.images.append(StreamStep(image, self.image.size))
            self.image = self.image.reduced(image, average=False)
        return (None if text is None else self.texts[-1]), (None if image is None else self.images[-1])

    def bias(self, streams: tuple[ModalityStream, ...], like: Tensor, queries: int) -> Tensor | None:
        """Return the additive attention bias over the keys of ``streams``; ``None`` if no key is masked."""
        if not self.method.counts_padding and not any(stream.ragged for stream in streams):
            return None
        mask = torch.cat([stream.mask for stream in streams], 1)
        return mask_bias(mask, like.dtype, queries if self.method.counts_padding else 0)

    def tokens(self, depth: int) -> list[list[int]]:
        """Return, for each row, the number of image tokens that entered each of ``depth`` layers."""
        counts, layers = [*self.entered, self.image.counts], self.method.layers
        # counts[i] is valid up to the method's i-th layer, and the last count behind all of them
        return [[counts[bisect_left(layers, layer)][row] for layer in range(depth)] for row in range(len(counts[0]))]

    def decisions(self) -> list[Reduction]:
        """Compose the decisions of all layers about each sample's image tokens."""
        total = self.images[0].merge.total if self.images else self.image.mask.shape[1]
        batch, device = len(self.text.counts), self.text.mask.device
        # [B, N]: the slot in which each original token is after the steps so far, and its weight there
        slot = torch.arange(total, device=device).expand(batch, -1)
        weight = torch.ones(batch, total, device=device)
        for step in self.images:
            next_slot, merge = step.merge.destinations(), step.merge
            size = torch.ones_like(next_slot, dtype=torch.float32) if step.size is None else step.size
            share = size / merge.sizes(step.size).gather(1, next_slot.clamp(min=0))
            kept, previous = slot >= 0, slot.clamp(min=0)  # −1 (dropped) is no index: gather slot 0 and mask the result
            weight = weight * share.gather(1, previous)
            slot = torch.where(kept, next_slot.gather(1, previous), -1)
        return [_reduction(*row) for row in zip(slot, weight, strict=True)]


def _reduction(slot: Tensor, weight: Tensor) -> Reduction:
    """Return the reduction of one image from each token's slot `[N]` (−1: dropped) and its weight there `[N]`.

    A slot's anchor is its first token.
    """
    source = (slot >= 0).nonzero().flatten()
    members = slot[source]
    first = torch.full((int(slot.max()) + 1,), len(slot), device=slot.device)  # N marks a slot without tokens
    first = first.scatter_reduce(0, members, source, "amin")
    anchors = first[first < len(slot)].sort().values
    if len(anchors) == len(source):
        return Reduction(len(slot), anchors)
    return Reduction(len(slot), anchors, Mixing(torch.searchsorted(anchors, first[members]), source, weight[source]))
