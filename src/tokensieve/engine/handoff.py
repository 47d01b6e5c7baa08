"""The objects that one stage hands to the next: the encoder's outputs, what became of each image, the short prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokensieve.engine.cache import PrefixInfo
from tokensieve.engine.prompt.placeholders import ColumnSelection, Placeholders
from tokensieve.engine.sizes import median_order, reordered
from tokensieve.models import TokenLayout
from tokensieve.reduction import Reduction
from tokensieve.tokens import ByLayer

Decisions = list[list[Reduction]]
"""`[sample][image]`."""

T = TypeVar("T")


@dataclass(frozen=True)
class EncoderOutputs:
    """The encoder stage's record of one encode call, per image in the call's order. M rows per image, one per patch.

    It travels as an attribute of the model's own output, since ``generate`` encodes images before the first forward.

    Attributes:
        layouts: the layout of the visual tokens of each image.
        by_layer: {evidence: {layer: `[M, ...]` per image}}, the readings of the probes.
        patches: `[M, C]` per image, the rows that entered the projector, if they were requested.
        cls_similarity: `[M]` per image, cosine to [CLS] in the vision encoder's output, if it was requested.
        pixel_hashes: `[1]` per image, if they were requested; one per view where views were joined.
        depth: number of layers of the vision encoder that can be read.
        notes: remarks on the evidence.
        reductions: per image, the decision of an encoder method (``None``: no method); dropped tokens have zero rows.
        rows_beside: `[S, C]` per image, the rows of a net that passed the layers beside the patches, if requested.
    """

    layouts: list[TokenLayout]
    by_layer: dict[str, dict[int, list[Tensor]]]
    patches: list[Tensor]
    cls_similarity: list[Tensor]
    pixel_hashes: list[Tensor]
    depth: int
    notes: tuple[str, ...]
    reductions: list[Reduction] | None
    rows_beside: list[Tensor] = field(default_factory=list)

    ATTRIBUTE = "_tokensieve_encoder_outputs"

    @classmethod
    def of(cls, encoded: Any) -> EncoderOutputs:
        """Return the record on the output of an encode call."""
        outputs: EncoderOutputs = getattr(encoded, cls.ATTRIBUTE)
        return outputs

    def attach_to(self, encoded: Any) -> None:
        """Put the record on the output of an encode call."""
        setattr(encoded, self.ATTRIBUTE, self)

    def select(self, images: Sequence[int]) -> EncoderOutputs:
        """Return the record of these images, in this order; an image may be repeated."""

        def pick(per_image: list[T]) -> list[T]:
            return [per_image[image] for image in images]

        return self._map_rows(pick, layouts=pick(self.layouts), reductions=self.reductions and pick(self.reductions))

    def beside(self, second: EncoderOutputs) -> EncoderOutputs:
        """Return the record of these images followed by those of another call."""

        def joined(name: str) -> Any:
            own_rows, second_rows = getattr(self, name), getattr(second, name)  # empty or None: not requested
            return own_rows and second_rows and [*own_rows, *second_rows]

        by_layer = {
            name: {layer: [*rows, *second.by_layer[name][layer]] for layer, rows in layers.items()}
            for name, layers in self.by_layer.items()
        }
        lists = {
            name: joined(name)
            for name in ("layouts", "patches", "cls_similarity", "pixel_hashes", "rows_beside", "reductions")
        }
        return replace(self, by_layer=by_layer, **lists)

    def join_views(self, groups: Sequence[Sequence[int]]) -> EncoderOutputs:
        """Return the record in which each group of entries is one image: its views, one after another."""

        def join(rows: list[Tensor]) -> list[Tensor]:
            return [torch.cat([rows[entry] for entry in group]) for group in groups]

        views = [[view for entry in group for view in self.layouts[entry].views] for group in groups]
        return self._map_rows(join, layouts=[TokenLayout(sum(map(prod, image)), tuple(image)) for image in views])

    def _map_rows(self, change: Callable[[list[Tensor]], list[Tensor]], **replaced: Any) -> EncoderOutputs:
        """Return the record with the evidence changed, list by list, and other attributes replaced."""

        def changed(rows: list[Tensor]) -> list[Tensor]:
            return change(rows) if rows else rows  # empty: not requested

        return replace(
            self,
            by_layer={name: {n: changed(read) for n, read in layers.items()} for name, layers in self.by_layer.items()},
            patches=changed(self.patches),
            cls_similarity=changed(self.cls_similarity),
            pixel_hashes=changed(self.pixel_hashes),
            rows_beside=changed(self.rows_beside),
            **replaced,
        )


@dataclass(frozen=True)
class ImageReduction:
    """The decisions of all stages about one image.

    There are three kinds of rows: the image's original tokens, the rows that the vision encoder made (fewer, where an
    encoder method had decided), and the rows that each decoder stage received.

    Attributes:
        layout: of the original tokens.
        decision: of the encoder and connector stages, on the original tokens.
        features: of the same stages, on the rows that the vision encoder made.
        inside: of each decoder stage, on the rows that it received.
        connector_scores: the scores that the connector method ranked the tokens by that entered the LLM, if it did.
        sizes: `[K]` float32, the original tokens that each token that is left stands for; ``None``: not requested.
        registers: `[R, D]`, the rows of the registers that ``decision`` has added; ``None``: it has added none.
        encoder_states: by encoder layer `[M, C]`, the state of each original patch, until a decoder stage has decided;
            ``None``: not requested.
    """

    layout: TokenLayout
    decision: Reduction
    features: Reduction
    inside: tuple[Reduction, ...] = ()
    connector_scores: Tensor | None = None
    sizes: Tensor | None = None
    registers: Tensor | None = None
    encoder_states: ByLayer | None = None

    def then_connector(self, following: Reduction, sizes: Tensor | None = None) -> ImageReduction:
        """Add a connector method's decision about the rows that are left."""
        decision, features = following.after(self.decision), following.after(self.features)
        return replace(self, decision=decision, features=features, connector_scores=following.ranking, sizes=sizes)

    def then_decoder(self, following: Reduction, sizes: Tensor | None = None) -> ImageReduction:
        """Add a decoder stage's decision about the rows that are left."""
        return replace(self, inside=(*self.inside, following), sizes=sizes, encoder_states=None)  # free the memory

    def with_registers(self, rows: Tensor) -> ImageReduction:
        """Add registers `[R, D]` behind the tokens that are left before the LLM."""
        return replace(self, decision=replace(self.decision, added=len(rows)), registers=rows)

    def states_left(self) -> ByLayer:
        """Return the encoder states `[N, C]` of the patches that entered the LLM."""
        assert self.encoder_states is not None
        by_layer, index = {}, self.layout.patch_index
        for layer, states in self.encoder_states.items():
            rows = states
            if index is not None:  # separators have no state
                rows = states.new_zeros(self.layout.total, states.shape[-1]).index_copy(0, index, states)
            rows, separator = self.decision.apply(rows), self.remaining.separator
            by_layer[layer] = rows if separator is None else rows[~separator]
        return ByLayer(by_layer, self.encoder_states.depth)

    def append_registers(self, rows: Tensor, content: bool = True) -> Tensor:
        """Return the rows `[K, D]` of the tokens that enter the LLM, and behind them those of the registers.

        Args:
            content: False appends zero rows, which add nothing to the registers.
        """
        if self.registers is None:
            return rows
        added = self.registers.to(rows) if content else rows.new_zeros(self.registers.shape)
        return torch.cat([rows, added])

    def at_medians(self) -> ImageReduction:
        """Move each token that was merged before the LLM to the median place of its group."""
        if self.decision.mixing is None or not self.decision.slots:
            return self
        medians, order = median_order(self.decision)
        scores, sizes = (rows if rows is None else rows[order] for rows in (self.connector_scores, self.sizes))
        decision, features = reordered(self.decision, order, medians), reordered(self.features, order)
        return replace(self, decision=decision, features=features, connector_scores=scores, sizes=sizes)

    @property
    def anchors(self) -> Tensor:
        """Original indices of the tokens that are left, `[K]`."""
        anchors = self.decision.anchors
        for stage in self.inside:
            kept = stage.anchors
            anchors = anchors[kept if self.registers is None else kept[kept < len(anchors)]]  # registers stand last
        return anchors

    @property
    def remaining(self) -> TokenLayout:
        """The layout of the tokens that are left; of an image with registers, all are one group."""
        if self.registers is not None:
            return TokenLayout(self.inside[-1].slots if self.inside else self.decision.slots)
        if self.layout.patch_index is None:
            return TokenLayout(len(self.anchors))
        return self.layout.left(self.anchors)

    @cached_property
    def entered(self) -> int:
        """Patches that entered the LLM: budgets of decoder methods are shares of this number."""
        if self.layout.patch_index is None:
            return len(self.decision.anchors)
        return self.layout.left(self.decision.anchors).patches

    def reduce_inside(self, rows: Tensor) -> Tensor:
        """Apply the decoder stages' decisions to rows `[N, D]` of the tokens that entered the LLM."""
        for stage in self.inside:
            rows = stage.apply(rows)
        return rows

    def final(self) -> Reduction:
        """Return the decisions of all stages as one, on the original tokens."""
        decision = self.decision
        for stage in self.inside:
            decision = stage.after(decision)
        return decision


@dataclass(frozen=True)
class Prefill:
    """A prompt as it enters the LLM.

    Attributes:
        kwargs: the arguments of the top-level forward.
        images: `[row][image]`; beams and several returns repeat a sample's row ``copies`` times.
        visual: `[B, n]` bool, True on visual tokens.
        placeholders: of the whole prompt.
        videos: numbers of the images that are videos.
        columns: the columns of the whole prompt that are left; ``None``: all.
        lengths: per row, the columns that are not padding.
        prefix: the bookkeeping that the KV cache must carry.
        whole: what a later turn needs to be decided anew, of the whole prompt; ``None``: it is not.
        projected: `[N, D]` per image, all projected tokens, for a method that changes the text by them; else empty.
    """

    kwargs: dict[str, Any]
    images: list[list[ImageReduction]]
    copies: int
    visual: Tensor
    placeholders: Placeholders
    videos: list[int]
    columns: ColumnSelection | None
    lengths: list[int]
    prefix: PrefixInfo
    whole: dict[str, Any] | None = None
    projected: Sequence[Tensor] = ()

    def between_frames(self) -> Tensor | None:
        """Return `[B, n]` bool, True between the frames of a video (timestamps, not user text); ``None``: no video."""
        inside = self.placeholders.between(self.videos)
        return inside if inside is None or self.columns is None else self.columns.take(inside)
