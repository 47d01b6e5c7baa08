"""How the visual tokens of one image lie: views that are grids, and rows between them that belong to no patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokensieve.reduction import Mixing, Reduction

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The visual tokens of one image, in their order in the prompt.

    Methods decide about patches only. A structure row (a newline after a row of the grid) stays if a patch of its line
    does.

    Attributes:
        total: N, tokens of the image.
        views: (height, width) of the grids that the patches form, one after another; empty where they form none.
        units: `[M]` int64, which row of the projector each patch token is, counted over a whole encode call; ``None``:
            the M rows that follow those of the image before.
        line: `[N]` int64, the line each token stands in; ``None`` where there are no structure rows.
        places: `[M]` int64, where the patches stand among all tokens; ``None``: there are no structure rows.
        tile: `[M]` int64, which tile each patch token is seen in, 0 for the whole image that comes first;
            ``None``: there are no tiles, or they do not form one mosaic.
        tiles: how many there are besides the whole image.
        mapped: whether ``units`` says which unit each patch token is; False where tokens were resampled from them.
        video: the views are the frames of a video, all of one size.
    """

    total: int
    views: tuple[Grid, ...] = ()
    units: Tensor | None = None
    line: Tensor | None = None
    places: Tensor | None = None
    tile: Tensor | None = None
    tiles: int = 0
    mapped: bool = True
    video: bool = False

    @classmethod
    def grid_of(cls, height: int, width: int) -> TokenLayout:
        """One grid and nothing else."""
        return cls(height * width, ((height, width),))

    @classmethod
    def frames_of(cls, frames: int, height: int, width: int) -> TokenLayout:
        """The frames of a video and nothing else."""
        return cls(frames * height * width, ((height, width),) * frames, video=True)

    @property
    def grid(self) -> Grid | None:
        """(height, width) of all tokens, if they are one grid; frames count as one below the other."""
        return self.stacked if self.places is None else None

    @property
    def stacked(self) -> Grid | None:
        """(height, width) of all patches, if they are one grid; frames count as one below the other."""
        if len(self.views) != 1 and not self.video:
            return None
        height, width = self.views[0]
        return len(self.views) * height, width

    @property
    def frames(self) -> int | None:
        """T, if it is a video."""
        return len(self.views) if self.video else None

    @property
    def patches(self) -> int:
        """M, tokens that belong to a patch."""
        return self.total if self.places is None else len(self.places)

    @cached_property
    def structure(self) -> Tensor | None:
        """`[N]` bool, True on structure rows; ``None``: there are none."""
        if self.places is None:
            return None
        return self.places.new_ones(self.total, dtype=torch.bool).index_fill(0, self.places, False)

    def to(self, device: torch.device) -> TokenLayout:
        """The same with its tensors on their way to a device."""
        own = {name: getattr(self, name) for name in ("units", "line", "places", "tile")}
        there: dict[str, Any] = {name: to_device(x, device) for name, x in own.items() if x is not None}
        return replace(self, **there)

    def left(self, anchors: Tensor) -> TokenLayout:
        """What is left when the tokens ``anchors`` stay: no grids any more."""
        if self.structure is None or self.line is None:
            return TokenLayout(len(anchors))
        if len(anchors) == self.total:
            return TokenLayout(self.total, line=self.line, places=self.places)
        line = self.line[anchors]  # lines that lost all their tokens are not counted
        line = pad((line.diff() != 0).long().cumsum(0), (1, 0))[: len(anchors)]
        return TokenLayout(len(anchors), line=line, places=(~self.structure[anchors]).nonzero().squeeze(-1))

    def spread(self, rows: Tensor) -> Tensor:
        """Rows of the patches `[M, C]` with zeros at structure rows, `[N, C]`."""
        places = self.places
        if places is None:
            return rows
        return rows.new_zeros((self.total, *rows.shape[1:])).index_copy(0, places.to(rows.device), rows)

    def merge_parts(self, parts: Sequence[Reduction]) -> Reduction:
        """Decisions about successive parts of the patches as one decision about all tokens."""
        if len(parts) == 1 and self.places is None:
            return parts[0]
        notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
        device, sizes = parts[0].anchors.device, [part.total for part in parts]
        if all(part.whole for part in parts):
            return Reduction.identity(self.total, device=device, grid=self.grid, notes=notes)
        places, starts = self.places, [sum(sizes[:number]) for number in range(len(sizes))]
        mixed = any(part.mixing is not None for part in parts)
        anchors = torch.cat([part.anchors + start for part, start in zip(parts, starts, strict=True)])
        mixing, first = None, 0
        if mixed:
            entries = []
            for part, start in zip(parts, starts, strict=True):
                own = part.entries()
                entries.append((own.slot + first, own.source + start, own.weight))
                first += part.slots
            mixing = Mixing(*(torch.cat(column) for column in zip(*entries, strict=True)))
        scores = None
        if all(part.scores is not None for part in parts):
            scores = self.spread(torch.cat([part.scores for part in parts if part.scores is not None]))
        if places is not None:
            anchors, mixing = self._among_all(places.to(device), anchors, mixing)
        projected = all(part.projected for part in parts)
        return Reduction(self.total, anchors, mixing, None, scores, self.grid, notes, projected)

    def _among_all(self, places: Tensor, anchors: Tensor, mixing: Mixing | None) -> tuple[Tensor, Mixing | None]:
        """Anchors and entries in terms of all tokens, with the structure rows whose line keeps a patch."""
        assert self.line is not None
        assert self.structure is not None
        kept = torch.zeros(self.total, dtype=torch.bool, device=anchors.device)
        lines = torch.zeros_like(kept).index_fill(0, self.line[places[anchors]], True)
        breaks = self.structure & lines[self.line]
        stay = kept.index_fill(0, places[anchors], True) | breaks
        slots = stay.nonzero().squeeze(-1)
        if mixing is None:
            return slots, None
        number = stay.cumsum(0) - 1
        own = slots[(~breaks[slots]).int().argsort(stable=True)[: len(slots) - len(anchors)]]
        slot = torch.cat([number[places[anchors]][mixing.slot], number[own]])
        source = torch.cat([places[mixing.source], own])
        weight = torch.cat([mixing.weight, mixing.weight.new_ones(len(own))])
        return slots, Mixing(slot, source, weight)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on its way to the device: nothing waits for what the device is doing."""
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
