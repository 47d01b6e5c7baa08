"""The sequences of one prefill on their way through the blocks of the LLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokensieve.engine.cache import PrefixInfo
from tokensieve.engine.connector.decide import budget_of
from tokensieve.engine.connector.prefill import ImageReduction, Prefill
from tokensieve.engine.prompt.placeholders import ColumnSelection, on_device
from tokensieve.methods import DecoderMethod

Member = tuple[int, int]  # a row of the batch, and which of its images


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """The sequences of a batch as a block of the LLM sees them.

    Attributes:
        columns: for each column, the one it was at the LLM's entry.
        visual: `[B, n]` bool, True on visual tokens.
        mask: `[B, n]` long, 0 on padding; ``None`` if there is none.
        lengths: per row, the columns that are no padding.
        images: per row and image, the columns `[K]` of its tokens.
        words: `[B, M]`, the columns of the user's words, and `[B, M]` bool; ``None`` if nobody asks.
    """

    columns: ColumnSelection
    visual: Tensor
    mask: Tensor | None
    lengths: list[int]
    images: list[list[Tensor]]
    words: tuple[Tensor, Tensor] | None

    @classmethod
    def enter(cls, prefill: Prefill, words: tuple[Tensor, Tensor] | None) -> SequenceLayout:
        """The stream at the LLM's entry."""
        visual, mask = prefill.visual, prefill.kwargs.get("attention_mask")
        batch, width = visual.shape
        ordered = (~visual).int().argsort(dim=-1, stable=True)  # visual columns first, in order
        sizes = [[plan.decision.slots for plan in plans] for plans in prefill.plans]
        images = [
            list(torch.split(row[: sum(of_row)], of_row)) if of_row else []
            for row, of_row in zip(ordered, sizes, strict=True)
        ]
        every = torch.arange(width, device=visual.device).expand(batch, -1)
        real = torch.ones_like(visual) if mask is None else mask.bool()
        columns = ColumnSelection(every, real, min(prefill.lengths) < width)
        return cls(columns, visual, None if mask is None else mask.long(), prefill.lengths, images, words)

    @property
    def width(self) -> int:
        return self.visual.shape[1]

    def keep(self, images: list[list[Tensor]]) -> tuple[SequenceLayout, ColumnSelection | None]:
        """The stream in which of every image only the given columns stay, and how to get there (``None``: all stay)."""
        lost = [_tokens(before) - _tokens(after) for before, after in zip(self.images, images, strict=True)]
        if not any(lost):
            return self, None
        stay = self.columns.valid & ~self.visual
        for row, kept in zip(stay, images, strict=True):
            for columns in kept:
                row.index_fill_(0, columns, True)
        left = [length - n for length, n in zip(self.lengths, lost, strict=True)]
        chosen = ColumnSelection.of(stay, left)
        # a column that stays moves to the number of staying columns before it, after the row's new padding
        padding = on_device([[max(left) - n] for n in left], stay.device)
        moved = stay.long().cumsum(-1) - 1 + padding
        following = SequenceLayout(
            columns=ColumnSelection(chosen.take(self.columns.index), chosen.valid, chosen.padded),
            visual=chosen.take(self.visual) & chosen.valid,
            mask=chosen.valid.long() if chosen.padded else None,
            lengths=left,
            images=[[row[columns] for columns in kept] for row, kept in zip(moved, images, strict=True)],
            words=self.words and (moved.gather(1, self.words[0]).clamp(min=0), self.words[1]),
        )
        return following, chosen

    def numbered(self) -> Tensor:
        """Contiguous position ids, `[B, n]`; padding repeats the first."""
        mask = torch.ones_like(self.visual) if self.mask is None else self.mask
        return (mask.long().cumsum(-1) - 1).clamp(min=0)


@dataclass(eq=False)
class PrefillState:
    """A prefill between two blocks.

    Attributes:
        prefill: how it entered the LLM.
        entry: the sequences as the first block saw them.
        stream: the sequences as the next block will see them.
        plans: `[row][image]`, what became of each image so far.
        methods: `[row][image]`, the method with the image's budget.
        states: for every block that saw fewer tokens than the first, what later steps must know.
        tokens: visual tokens per image that each block saw, `{block: [row][image]}`.
        handed: positions and mask of the stream, by kind of block: made by the first of a stage, used by all of them.
        state: likewise; what later steps must know.
        seen: evidence that was read on the way, by name.
    """

    prefill: Prefill
    entry: SequenceLayout
    stream: SequenceLayout
    plans: list[list[ImageReduction]]
    methods: list[list[DecoderMethod]]
    states: dict[int, PrefixInfo] = field(default_factory=dict)
    tokens: dict[int, list[list[int]]] = field(default_factory=dict)
    handed: dict[str, dict[str, Any]] = field(default_factory=dict)
    state: PrefixInfo | None = None
    seen: dict[str, Tensor | None] = field(default_factory=dict)

    @classmethod
    def enter(
        cls, prefill: Prefill, methods: list[list[DecoderMethod]], words: tuple[Tensor, Tensor] | None
    ) -> PrefillState:
        stream = SequenceLayout.enter(prefill, words)
        return cls(prefill, stream, stream, [list(plans) for plans in prefill.plans], methods)

    def plan(self, member: Member) -> ImageReduction:
        return self.plans[member[0]][member[1]]

    def method(self, member: Member) -> DecoderMethod:
        return self.methods[member[0]][member[1]]

    def kind(self, member: Member) -> tuple[Any, ...]:
        """What images of equal size must have in common besides, to be decided upon in one call."""
        plan = self.plan(member)
        return plan.entered, plan.decision.grid, budget_of(self.method(member))

    @property
    def untouched(self) -> bool:
        """Whether every token is still there."""
        return self.stream is self.entry

    def renumbered(self) -> Tensor | None:
        """`[B, 1]` bool, rows that lost tokens inside the LLM: those that contiguous positions apply to; None: all."""
        lost = [any(plan.reduced_inside for plan in plans) for plans in self.plans]
        return None if all(lost) else on_device(lost, self.stream.visual.device)[:, None]

    def move(self, images: list[list[Tensor]]) -> ColumnSelection | None:
        """Let all but the given columns of each image leave; returns how to get there, ``None`` if all stay."""
        self.stream, chosen = self.stream.keep(images)
        if chosen is not None:
            self.handed, self.state = {}, None
        return chosen


def _tokens(images: list[Tensor]) -> int:
    return sum(map(len, images))
