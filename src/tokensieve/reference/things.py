"""The things on a scene's canvas, and the sizes of the canvas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokensieve.reference.vocabulary import PLACES

CANVAS = 120  # px
TOKEN = 10  # px
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
