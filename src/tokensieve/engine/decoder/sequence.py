"""The sequences of one prefill on their way through the layers of the LLM."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokensieve.engine.cache import PrefixInfo
from tokensieve.engine.handoff import ImageReduction, Prefill
from tokensieve.engine.prompt.placeholders import ColumnSelection, on_device
from tokensieve.methods import DecoderMethod

Member = tuple[int, int]
"""A row of the batch, and the number of an image in that row."""


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """The sequences of a batch as a layer of the LLM receives them.

    Attributes:
        columns: for each column, the one it was when it entered the LLM.
        visual: `[B, n]` bool, True on visual tokens.
        mask: `[B, n]` long, 0 on padding; ``None`` if there is none.
        lengths: per row, the columns that are not padding.
        images: per row and image, the columns `[K]` of its tokens.
        text: `[B, M]`, the columns of the user's words, and `[B, M]` bool, False on padding; ``None``: not requested.
    """

    columns: ColumnSelection
    visual: Tensor
    mask: Tensor | None
    lengths: list[int]
    images: list[list[Tensor]]
    text: tuple[Tensor, Tensor] | None

    @classmethod
    def enter(cls, prefill: Prefill, text: tuple[Tensor, Tensor] | None) -> SequenceLayout:
        """Return the sequences as they enter the LLM."""
        visual, mask = prefill.visual, prefill.kwargs.get("attention_mask")
        batch, width = visual.shape
        # a stable sort puts the visual columns of each row first, in order; they are then split by image
        visual_first = (~visual).int().argsort(dim=-1, stable=True)
        sizes = [[image.decision.slots for image in images] for images in prefill.images]
        images = [
            list(torch.split(row[: sum(of_row)], of_row)) if of_row else []
            for row, of_row in zip(visual_first, sizes, strict=True)
        ]
        all_columns = torch.arange(width, device=visual.device).expand(batch, -1)
        valid = torch.ones_like(visual) if mask is None else mask.bool()
        columns = ColumnSelection(all_columns, valid, min(prefill.lengths) < width)
        return cls(columns, visual, None if mask is None else mask.long(), prefill.lengths, images, text)

    def keep(self, images: list[list[Tensor]]) -> tuple[SequenceLayout, ColumnSelection | None]:
        """Return the sequences in which only the given columns of each image stay, and the selection that leads there.

        The selection is ``None`` if all columns stay.
        """
        dropped = [
            sum(map(len, before)) - sum(map(len, after)) for before, after in zip(self.images, images, strict=True)
        ]
        if not any(dropped):
            return self, None
        stay = self.columns.valid & ~self.visual
        for row, kept in zip(stay, images, strict=True):
            for columns in kept:
                row.index_fill_(0, columns, True)
        lengths = [length - n for length, n in zip(self.lengths, dropped, strict=True)]
        selection = ColumnSelection.of(stay, lengths)
        # a column that stays moves to the number of staying columns before it, behind the row's new padding
        padding = on_device([[max(lengths) - n] for n in lengths], stay.device)
        new_column = stay.long().cumsum(-1) - 1 + padding
        following = SequenceLayout(
            columns=ColumnSelection(selection.take(self.columns.index), selection.valid, selection.padded),
            visual=selection.take(self.visual) & selection.valid,
            mask=selection.valid.long() if selection.padded else None,
            lengths=lengths,
            images=[[row[columns] for columns in kept] for row, kept in zip(new_column, images, strict=True)],
            # padding among the words may point at a column that left: clamp it to one that exists
            text=self.text and (new_column.gather(1, self.text[0]).clamp(min=0), self.text[1]),
        )
        return following, selection

    def contiguous_positions(self) -> Tensor:
        """Return contiguous position ids, `[B, n]`; padding repeats the first."""
        mask = torch.ones_like(self.visual) if self.mask is None else self.mask
        return (mask.long().cumsum(-1) - 1).clamp(min=0)


@dataclass(eq=False)
class PrefillState:
    """A running prefill, between two layers of the LLM.

    Attributes:
        prefill: the prompt as it entered the LLM.
        entry: the sequences as the first layer received them.
        sequence: the sequences as the next layer receives them.
        images: `[row][image]`, the decisions so far.
        methods: `[row][image]`, the method with the image's budget.
        schedules: {image: tokens after each of the method's layers}, if the method is adaptive.
        prefixes: {layer: prefix} for each layer that received fewer tokens than the first.
        tokens: {layer: `[row][image]`}, the visual tokens that each layer received.
        layer_inputs: by kind of attention, positions and mask of ``sequence``; shared by all layers until tokens leave.
        prefix: the prefix of ``sequence``, shared likewise.
        evidence: by name, read or copied on the way: `[B, n, ...]` of the sequence at that time.
        query: a learned query that runs beside the prompt (a ``QueryRow``); ``None``: none does.
        compute: the visual rows, for layers that do less work on them (a ``VisualRows``); ``None``: none does so far.
    """

    prefill: Prefill
    entry: SequenceLayout
    sequence: SequenceLayout
    images: list[list[ImageReduction]]
    methods: list[list[DecoderMethod]]
    schedules: dict[Member, list[int]] = field(default_factory=dict)
    prefixes: dict[int, PrefixInfo] = field(default_factory=dict)
    tokens: dict[int, list[list[int]]] = field(default_factory=dict)
    layer_inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    prefix: PrefixInfo | None = None
    evidence: dict[str, Tensor] = field(default_factory=dict)
    query: Any = None
    compute: Any = None

    @classmethod
    def enter(
        cls, prefill: Prefill, methods: list[list[DecoderMethod]], text: tuple[Tensor, Tensor] | None
    ) -> PrefillState:
        """Return the state of a prompt that enters the LLM."""
        sequence = SequenceLayout.enter(prefill, text)
        return cls(prefill, sequence, sequence, [list(images) for images in prefill.images], methods)

    @property
    def members(self) -> list[Member]:
        """All images, row by row."""
        return [(row, image) for row, images in enumerate(self.images) for image in range(len(images))]

    def image(self, member: Member) -> ImageReduction:
        return self.images[member[0]][member[1]]

    def method(self, member: Member) -> DecoderMethod:
        return self.methods[member[0]][member[1]]

    def columns(self, member: Member) -> Tensor:
        return self.sequence.images[member[0]][member[1]]

    def columns_after_images(self) -> Tensor:
        """Return the column that follows each image of a row, `[B, I]`; the last column if none follows."""
        columns = self.sequence.columns.index
        ends = [torch.stack([c[-1] for c in images]) if images else columns[0, :1] for images in self.sequence.images]
        return (pad_sequence(ends, batch_first=True) + 1).clamp(max=columns.shape[1] - 1)

    def batch_key(self, member: Member) -> tuple[Any, ...]:
        """Return what images of equal size must have in common, besides, to be decided about in one call."""
        image, method = self.image(member), self.method(member)
        return image.entered, image.decision.grid, image.layout.frames, method.budget, getattr(method, "average", None)

    @property
    def untouched(self) -> bool:
        """Whether every token is still there."""
        return self.sequence is self.entry

    def renumbered_rows(self) -> Tensor | None:
        """Return `[B, 1]` bool, the rows that lost tokens inside the LLM: contiguous positions apply to them.

        ``None``: all rows did.
        """
        dropped = [[stage.slots < stage.total for image in row for stage in image.inside] for row in self.images]
        reduced = list(map(any, dropped))
        return None if all(reduced) else on_device(reduced, self.sequence.visual.device)[:, None]

    def drop(self, images: list[list[Tensor]]) -> ColumnSelection | None:
        """Keep only the given columns of each image; returns the selection, ``None`` if all columns stay."""
        self.sequence, selection = self.sequence.keep(images)
        if selection is not None:
            self.layer_inputs, self.prefix = {}, None
        return selection

    def restore(self) -> None:
        """Take back all decisions inside the LLM: every token that entered stands in the sequence again."""
        self.images = [[replace(image, inside=()) for image in row] for row in self.images]
        self.sequence, self.layer_inputs, self.prefix = self.entry, {}, None
