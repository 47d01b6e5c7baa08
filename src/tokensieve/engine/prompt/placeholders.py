"""The columns of a batch of prompts that hold visual tokens, and selections of columns."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from tokensieve.errors import Refusal
from tokensieve.models.layout import to_device


@dataclass(frozen=True, eq=False)
class Placeholders:
    """The placeholders of one batch of prompts, read once.

    Attributes:
        visual: `[B, L]` bool, True on placeholders, on the batch's device.
        images: per row, the tokens of each of its images, in order.
        not_padding: `[B, L]` bool, False on padding.
        lengths: per row, the columns that are not padding.
        end: columns up to and including the last placeholder of any row.
    """

    visual: Tensor
    images: list[list[int]]
    not_padding: Tensor
    lengths: list[int]
    end: int

    @classmethod
    def read(cls, ids: Tensor, mask: Tensor | None, token: int, sizes: list[int], kind: str = "image") -> Placeholders:
        """Find the placeholders ``token`` in ``ids`` `[B, L]` of images with ``sizes`` tokens, row by row.

        Args:
            mask: `[B, L]`, 0 on padding, or ``None``.
            kind: the name of these images in an error.

        Raises:
            Refusal: if placeholders and image tokens do not match, or a row is padded on the right.
        """
        visual = ids == token
        not_padding = torch.ones_like(visual) if mask is None else mask.bool()
        columns = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        statistics = torch.cat(
            [visual.sum(-1), not_padding.sum(-1), not_padding[:, -1], (visual * columns).amax()[None]]
        )
        *numbers, end = statistics.tolist()  # the only synchronisation with the device
        per_row, lengths, ends_unpadded = (numbers[i * len(ids) : (i + 1) * len(ids)] for i in range(3))
        if not all(ends_unpadded):
            raise Refusal("right-padded prompts cannot be reduced; set processor.tokenizer.padding_side = 'left'")
        images: list[list[int]] = []
        remaining = list(sizes)
        for row, count in enumerate(per_row):
            images.append([])
            while count > 0 and remaining:
                count -= remaining[0]
                images[-1].append(remaining.pop(0))
            if count != 0:
                raise Refusal(
                    f"sample {row} has {per_row[row]} {kind} placeholders; its {kind}s have {images[-1]} tokens"
                )
        if remaining:
            raise Refusal(f"the batch has {sum(per_row)} {kind} placeholders; its {kind}s have {sum(sizes)} tokens")
        return cls(visual, images, not_padding, lengths, end)

    def spans(self) -> list[list[tuple[int, int]]]:
        """Return per row the first and the last column of each of its images."""
        spans: list[list[tuple[int, int]]] = []
        for row, sizes in zip(self.visual.cpu(), self.images, strict=True):
            columns, edges = row.nonzero().squeeze(-1).tolist(), [0, *accumulate(sizes)]
            spans.append([(columns[first], columns[end - 1]) for first, end in pairwise(edges)])
        return spans

    def between(self, images: Collection[int]) -> Tensor | None:
        """Return `[B, L]` bool, True from the first to the last placeholder of some images, by their numbers.

        ``None`` if there are no such images.
        """
        if not images:
            return None
        inside = torch.zeros_like(self.visual)
        spans = [(row, *span) for row, of_row in enumerate(self.spans()) for span in of_row]
        for row, first, last in (spans[image] for image in images):
            inside[row, first : last + 1] = True
        return inside

    def side_by_side(self) -> list[list[list[int]]]:
        """Group the images of each row, by their numbers in it: those of one group have adjacent placeholders."""
        groups: list[list[list[int]]] = []
        for spans in self.spans():
            groups.append([])
            for image, (first, _) in enumerate(spans):
                adjacent = image > 0 and first == spans[image - 1][1] + 1
                groups[-1][-1].append(image) if adjacent else groups[-1].append([image])
        return groups


@dataclass(frozen=True, eq=False)
class ColumnSelection:
    """The columns of a batch that stay, each row left-padded to the longest.

    Attributes:
        index: `[B, n]`, original column of each new column, ascending in the valid part.
        valid: `[B, n]` bool, False on padding.
        padded: whether there is any padding.
    """

    index: Tensor
    valid: Tensor
    padded: bool

    @classmethod
    def of(cls, stay: Tensor, lengths: list[int]) -> ColumnSelection:
        """Select the columns where ``stay`` `[B, L]` bool is True; ``lengths`` is their number in each row."""
        # a stable sort moves the staying columns to the end of each row, in order; the longest row sets the width
        index = stay.int().argsort(dim=-1, stable=True)[:, stay.shape[1] - max(lengths) :]
        return cls(index, stay.gather(-1, index), min(lengths) != max(lengths))

    @classmethod
    def repeating(cls, counts: Tensor, lengths: list[int]) -> tuple[ColumnSelection, Tensor]:
        """Select each column as often as ``counts`` `[B, L]` says; ``lengths`` is the sum of each row.

        Returns:
            The selection, and `[B, n]`, the number of each new column among those of the same old one.
        """
        width, ends = max(lengths), counts.cumsum(-1)
        padding = on_device([[width - length] for length in lengths], counts.device)
        place = torch.arange(width, device=counts.device) - padding  # negative on padding
        # an old column holds the places from the end of the one before it to its own end
        index = torch.searchsorted(ends, place.clamp(min=0), right=True).clamp(max=counts.shape[1] - 1)
        number = place - (ends - counts).gather(-1, index)
        return cls(index, place >= 0, min(lengths) != width), number

    def take(self, x: Tensor, filler: int | None = None) -> Tensor:
        """Return the selected columns of `[…, B or 1, L]`; padding gets ``filler`` if one is given."""
        lead = x.shape[:-2]
        selected = x.expand(*lead, len(self.index), -1).gather(-1, self.index.expand(*lead, *self.index.shape))
        return selected.masked_fill(~self.valid, filler) if filler is not None and self.padded else selected

    def take_rows(self, x: Tensor) -> Tensor:
        """Return the selected rows of `[…, B or 1, L, D]`."""
        lead, width = x.shape[:-3], x.shape[-1]
        index = self.index[..., None].expand(*lead, *self.index.shape, width)
        return x.expand(*lead, len(self.index), -1, -1).gather(-2, index)


def on_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """Copy ``values`` to the device as a small tensor, without waiting for it."""
    return to_device(torch.tensor(values), device)


def equal_groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return the indices grouped by equal keys, in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())
