"""The layout of one image's visual tokens: grids of patches, and separator tokens between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokensieve.reduction import Mixing, Reduction

Grid = tuple[int, int]
Separators: TypeAlias = Literal["kept-lines", "none"]


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The N visual tokens of one image in prompt order; M of them are patches and the others are separators.

    Methods decide about patches only. By default, a separator (the newline token after a row of a grid) is kept if a
    patch of its line is kept.

    Attributes:
        total: N, all tokens of the image.
        views: (height, width) of the successive grids of patches; empty if the patches form no grid.
        units: `[M]` int64, the projector row of each patch, numbered over a whole encode call. ``None``: the M rows
            after the previous image's rows.
        line: `[N]` int64, the line of each token; ``None`` without separators.
        patch_index: `[M]` int64, the index of each patch among the N tokens; ``None`` without separators.
        tile: `[M]` int64, the tile of each patch; 0 is the base tile (the whole image), which comes first. ``None``
            without tiles, or if the tiles do not form one mosaic.
        tiles: number of tiles besides the base tile.
        mapped: whether each patch is one unit; False if the tokens were resampled from the units.
        video: the views are the frames of a video, all of one size.
        separators: of an image that loses a patch, "kept-lines" keeps the separators of lines that keep a patch, and
            "none" drops all, so that the number of kept tokens does not depend on which patches are kept.
    """

    total: int
    views: tuple[Grid, ...] = ()
    units: Tensor | None = None
    line: Tensor | None = None
    patch_index: Tensor | None = None
    tile: Tensor | None = None
    tiles: int = 0
    mapped: bool = True
    video: bool = False
    separators: Separators = "kept-lines"

    @classmethod
    def grid_of(cls, height: int, width: int) -> TokenLayout:
        """Return the layout of one grid."""
        return cls(height * width, ((height, width),))

    @classmethod
    def frames_of(cls, frames: int, height: int, width: int) -> TokenLayout:
        """Return the layout of a video's frames."""
        return cls(frames * height * width, ((height, width),) * frames, video=True)

    @property
    def grid(self) -> Grid | None:
        """Return (height, width) if all tokens form one grid; the frames of a video are stacked vertically."""
        return self.stacked if self.patch_index is None else None

    @property
    def stacked(self) -> Grid | None:
        """Return (height, width) if the patches form one grid; the frames of a video are stacked vertically."""
        if len(self.views) != 1 and not self.video:
            return None
        height, width = self.views[0]
        return len(self.views) * height, width

    @property
    def frames(self) -> int | None:
        """Return T for a video."""
        return len(self.views) if self.video else None

    @property
    def patches(self) -> int:
        """Return M, the number of patches."""
        return self.total if self.patch_index is None else len(self.patch_index)

    @cached_property
    def separator(self) -> Tensor | None:
        """Return `[N]` bool, True on separators; ``None`` without separators."""
        if self.patch_index is None:
            return None
        return self.patch_index.new_ones(self.total, dtype=torch.bool).index_fill(0, self.patch_index, False)

    def to(self, device: torch.device) -> TokenLayout:
        """Copy the tensors to a device without waiting for it."""
        tensors = {name: getattr(self, name) for name in ("units", "line", "patch_index", "tile")}
        copies: dict[str, Any] = {name: to_device(x, device) for name, x in tensors.items() if x is not None}
        return replace(self, **copies)

    def left(self, anchors: Tensor) -> TokenLayout:
        """Return the layout of the kept tokens ``anchors``, without grids."""
        if self.separator is None or self.line is None:
            return TokenLayout(len(anchors))
        if len(anchors) == self.total:
            return TokenLayout(self.total, line=self.line, patch_index=self.patch_index, separators=self.separators)
        line = self.line[anchors]  # the kept lines are numbered anew: a line that lost all its tokens has no number
        line = pad((line.diff() != 0).long().cumsum(0), (1, 0))[: len(anchors)]
        patch_index = (~self.separator[anchors]).nonzero().squeeze(-1)
        return TokenLayout(len(anchors), line=line, patch_index=patch_index, separators=self.separators)

    def insert_separators(self, rows: Tensor) -> Tensor:
        """Insert zero rows at the separators, `[M, C]` rows of the patches to `[N, C]`."""
        if self.patch_index is None:
            return rows
        return rows.new_zeros((self.total, *rows.shape[1:])).index_copy(0, self.patch_index.to(rows.device), rows)

    def merge_parts(self, parts: Sequence[Reduction]) -> Reduction:
        """Merge the decisions about successive parts of the M patches into one decision about all N tokens."""
        if len(parts) == 1 and self.patch_index is None:
            return parts[0]
        notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
        device, sizes = parts[0].anchors.device, [part.total for part in parts]
        if all(part.whole for part in parts):
            return Reduction.identity(self.total, device=device, grid=self.grid, notes=notes)
        # each part counts its patches and its slots from 0: shift both by the numbers of the parts before
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        anchors = torch.cat([part.anchors + start for part, start in zip(parts, starts, strict=True)])
        mixing, first_slot = None, 0
        if any(part.mixing is not None for part in parts):
            entries = []
            for part, start in zip(parts, starts, strict=True):
                entry = part.entries()  # a pruned part has no mixing: its entries are the identity on its anchors
                entries.append((entry.slot + first_slot, entry.source + start, entry.weight))
                first_slot += part.anchors.shape[-1]
            mixing = Mixing(*(torch.cat(column) for column in zip(*entries, strict=True)))
        scores = None
        if all(part.scores is not None for part in parts):
            scores = self.insert_separators(torch.cat([part.scores for part in parts if part.scores is not None]))
        rows_of_parts = [part.rows for part in parts if part.rows is not None]  # of all parts, or of none
        rows = torch.cat(rows_of_parts) if rows_of_parts else None
        if self.patch_index is not None:
            of_patches = self.patch_index.to(device)[anchors]
            anchors, mixing = self._among_all(self.patch_index.to(device), anchors, mixing)
            if rows is not None:  # the engine fills in the rows of separators
                slots = torch.searchsorted(anchors, of_patches)
                rows = rows.new_zeros((len(anchors), rows.shape[-1])).index_copy(0, slots, rows)
        projected, added = all(part.projected for part in parts), sum(part.added for part in parts)
        return Reduction(self.total, anchors, mixing, None, scores, self.grid, notes, projected, rows=rows, added=added)

    def _among_all(self, patch_index: Tensor, anchors: Tensor, mixing: Mixing | None) -> tuple[Tensor, Mixing | None]:
        """Renumber anchors and entries from M patches to N tokens; add the separators that are kept."""
        assert self.line is not None
        assert self.separator is not None
        if self.separators == "none":
            if mixing is not None:
                mixing = Mixing(mixing.slot, patch_index[mixing.source], mixing.weight)
            return patch_index[anchors], mixing
        kept = torch.zeros(self.total, dtype=torch.bool, device=anchors.device)
        # [N] bool indexed by line: there are at most as many lines as tokens, so that their number need not be known
        line_kept = torch.zeros_like(kept).index_fill(0, self.line[patch_index[anchors]], True)
        separator_kept = self.separator & line_kept[self.line]
        kept = kept.index_fill(0, patch_index[anchors], True) | separator_kept
        slots = kept.nonzero().squeeze(-1)
        if mixing is None:
            return slots, None
        slot_of = kept.cumsum(0) - 1  # [N]: the slot of each kept token
        # a stable sort puts the kept separators first; shapes give their number, so this needs no further device sync
        separators = slots[(~separator_kept[slots]).int().argsort(stable=True)[: len(slots) - len(anchors)]]
        slot = torch.cat([slot_of[patch_index[anchors]][mixing.slot], slot_of[separators]])
        source = torch.cat([patch_index[mixing.source], separators])
        weight = torch.cat([mixing.weight, mixing.weight.new_ones(len(separators))])  # separators are copied
        return slots, Mixing(slot, source, weight)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy ``x`` to the device; from pinned memory, so that the host does not wait for the device."""
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
