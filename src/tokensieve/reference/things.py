"""The things on a scene's canvas, and the sizes of the canvas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokensieve.reference.vocabulary import GRID, PLACES

TOKEN = 10  # px
CANVAS = GRID * TOKEN  # px
CELL = 20  # px: one object and its frame
Box = tuple[int, int, int, int]  # left, top, right, bottom in px; right and bottom exclusive
Kind = Literal["digit", "icon", "sign", "clutter"]


@dataclass(frozen=True)
class Thing:
    """One thing in a scene.

    An `opacity` below 1 lowers the contrast. `source` is the index of the digit instance, or the seed of a piece of
    photograph. `partner` is the index of the thing beside it.
    """

    kind: Kind
    name: str
    box: Box
    colour: str = ""
    frame: str = "none"
    opacity: float = 1.0
    size: int = 16
    angle: float = 0.0
    source: int = 0
    partner: int | None = None

    @property
    def place(self) -> str:
        """Return the corner of the canvas that holds the thing's centre."""
        right = self.box[0] + self.box[2] > CANVAS
        low = self.box[1] + self.box[3] > CANVAS
        return PLACES[2 * low + right]


def covered(box: Box) -> list[int]:
    """Return the row-major indices of the visual tokens that a box covers by more than a third of their area."""
    left, top, right, bottom = box

    def overlap(low: int, high: int, token: int) -> int:
        return max(0, min(high, (token + 1) * TOKEN) - max(low, token * TOKEN))

    return [
        row * GRID + column
        for row in range(top // TOKEN, min(GRID, bottom // TOKEN + 1))
        for column in range(left // TOKEN, min(GRID, right // TOKEN + 1))
        if overlap(top, bottom, row) * overlap(left, right, column) * 3 > TOKEN * TOKEN
    ]
