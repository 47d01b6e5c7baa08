"""Seeded descriptions of scenes. `render.py` draws their things; `questions.py` has the questions about them.

The canvas is 120 × 120 px, 12 × 12 visual tokens of 10 px. Each quadrant is cut into two slots, side by side or one
above the other. A slot holds a pair (an icon and a digit that touch), a single object, the sign or a piece of clutter.
Things in different slots are well apart, so "beside" has one meaning.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from tokensieve.reference import sources
from tokensieve.reference.render import background, draw
from tokensieve.reference.sources import SPLITS, Split, check_split
from tokensieve.reference.things import CANVAS, CELL, TOKEN, Kind, Thing
from tokensieve.reference.vocabulary import COLOURS, DIGITS, FRAMES, ICONS, SIGNS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

Content = Literal["pair", "digit", "icon", "sign", "clutter"]  # of a slot
_ORDERS: tuple[tuple[Literal["digit", "icon"], Literal["digit", "icon"]], ...] = (("icon", "digit"), ("digit", "icon"))


@dataclass(frozen=True)
class Scene:
    """A scene: its background (name, corner and side in px of a crop of the split's strip), dimming, and things."""

    split: Split
    seed: int
    index: int
    photograph: str
    crop: tuple[int, int, int]
    dim: float
    things: tuple[Thing, ...]

    @cached_property
    def objects(self) -> tuple[Thing, ...]:
        """Return the digits and icons, which questions name."""
        return tuple(thing for thing in self.things if thing.kind in ("digit", "icon"))

    @cached_property
    def pairs(self) -> tuple[tuple[Thing, Thing], ...]:
        """Return the pairs (icon, digit) that are beside each other."""
        icons = (thing for thing in self.things if thing.kind == "icon")
        return tuple((icon, self.things[icon.partner]) for icon in icons if icon.partner is not None)

    def of(self, kind: Kind) -> tuple[Thing, ...]:
        """Return the things of one kind."""
        return tuple(thing for thing in self.things if thing.kind == kind)

    @cached_property
    def image(self) -> Image.Image:
        """Return the drawn scene, RGB, 120 × 120 px; it is drawn once."""
        return self.render()

    def render(self) -> Image.Image:
        """Draw the scene, RGB, 120 × 120 px: a dimmed photograph with the things on top."""
        canvas = background(self.split, self.photograph, self.crop, self.dim)
        for thing in self.things:
            draw(canvas, thing, self.split)
        return canvas


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """Generate scene number `index` of a split; equal arguments give equal scenes."""
    part = check_split(split)
    rng = np.random.default_rng((SPLITS.index(part), seed, index))
    contents, upright, slots = _layout(part, rng)
    shift_x, shift_y = (int(shift) * TOKEN for shift in rng.integers(0, 2, 2))
    deck = _Deck(part, rng)
    things: list[Thing] = []
    for content, slot in zip(contents, slots, strict=True):
        vertical = upright[slot // 2]
        x, y = _corner(slot, vertical, rng, length=2 if content == "pair" else 1)
        x, y = x + shift_x, y + shift_y
        if content == "pair":
            first, second = _ORDERS[rng.integers(2)]
            number = len(things)
            things.append(deck.deal(first, x, y, partner=number + 1))
            things.append(deck.deal(second, x + CELL * (not vertical), y + CELL * vertical, partner=number))
        elif content == "sign":
            things.append(_sign(x - (x - shift_x) % (CANVAS // 2), y, rng))
        elif content == "clutter":
            things.append(_clutter(x, y, rng))
        else:
            things.append(deck.deal(content, x, y))
    name = str(rng.choice(sources.PHOTOGRAPHS))
    return Scene(part, seed, index, name, _crop(part, name, rng), float(rng.uniform(0.25, 0.5)), tuple(things))


class _Deck:
    """Deals the objects of a scene; no two share a name or a colour."""

    def __init__(self, split: Split, rng: np.random.Generator) -> None:
        self.split, self.rng = split, rng
        self.colours = iter(rng.permutation(list(COLOURS)).tolist())
        digits, icons = iter(rng.permutation(DIGITS).tolist()), iter(rng.permutation(list(ICONS)).tolist())
        self.names: dict[Content, Iterator[str]] = {"digit": digits, "icon": icons}

    def deal(self, kind: Literal["digit", "icon"], x: int, y: int, partner: int | None = None) -> Thing:
        """Create an object whose cell is at (`x`, `y`) px, up to 2 px off."""
        rng, name = self.rng, next(self.names[kind])
        dx, dy = rng.integers(-2, 3, 2)
        left, top = (min(max(0, int(corner)), CANVAS - CELL) for corner in (x + dx, y + dy))
        return Thing(
            kind=kind,
            name=name,
            box=(left, top, left + CELL, top + CELL),
            colour=next(self.colours),
            frame=FRAMES[rng.integers(len(FRAMES))],
            opacity=float(rng.uniform(0.55, 1.0)),
            size=int(rng.integers(14, 17)) if kind == "icon" else int(rng.integers(16, 19)),
            angle=float(rng.uniform(-12, 12)) if kind == "digit" else 0.0,
            source=int(rng.choice(sources.digit_instances(self.split, name))) if kind == "digit" else 0,
            partner=partner,
        )


def _layout(split: Split, rng: np.random.Generator) -> tuple[list[Content], list[bool], list[int]]:
    """Draw the contents, which quadrants have upright slots, and the slots of the contents; splits share no layout."""
    while True:
        digits, icons = int(rng.integers(3, 7)), int(rng.integers(3, 5))
        pairs = min(digits, icons, 3 + int(rng.integers(2)))
        counts: dict[Content, int] = {"sign": 1, "pair": pairs, "digit": digits - pairs, "icon": icons - pairs}
        contents = [content for content, count in counts.items() for _ in range(count)]
        upright = [bool(bit) for bit in rng.integers(0, 2, 4)]
        flat = [slot for slot in range(8) if not upright[slot // 2]]
        if len(contents) > 8 or digits + icons > len(COLOURS) or not flat:
            continue
        sign = flat[rng.integers(len(flat))]  # words need the width
        slots = [sign, *rng.permutation([slot for slot in range(8) if slot != sign]).tolist()]
        contents += ["clutter"] * (8 - len(contents))
        if _owner(contents, upright, slots) == split:
            return contents, upright, slots


def _owner(contents: list[Content], upright: list[bool], slots: list[int]) -> Split:
    """Return the split of a layout: of twenty layouts, three are for test and one is for validation."""
    signature = repr(sorted(zip(slots, contents, strict=True))) + repr(upright)
    bucket = zlib.crc32(signature.encode()) % 20
    return "test" if bucket < 3 else "validation" if bucket < 4 else "train"


def _corner(slot: int, vertical: bool, rng: np.random.Generator, length: int) -> tuple[int, int]:
    """Draw the top left corner in px of a thing of `length` cells; one token is free at its slot's far edges."""
    quadrant, half = divmod(slot, 2)
    across, down = (3, 6) if vertical else (6, 3)
    wide, high = (1, length) if vertical else (length, 1)
    x = 6 * (quadrant % 2) + (3 * half if vertical else 0) + int(rng.integers(0, across - 2 * wide))
    y = 6 * (quadrant // 2) + (0 if vertical else 3 * half) + int(rng.integers(0, down - 2 * high))
    return x * TOKEN, y * TOKEN


def _sign(x: int, y: int, rng: np.random.Generator) -> Thing:
    """Create a plate with a word, within 50 px from `x`."""
    name = list(SIGNS)[rng.integers(len(SIGNS))]
    width, height = (side + 6 for side in SIGNS[name])
    left, top = x + int(rng.integers(0, 51 - width)), y + int(rng.integers(0, 21 - height))
    return Thing("sign", name, (left, top, left + width, top + height), opacity=float(rng.uniform(0.6, 1.0)))


def _clutter(x: int, y: int, rng: np.random.Generator) -> Thing:
    """Create a square piece of photograph at (`x`, `y`) px."""
    side = int(rng.integers(14, CELL + 1))
    name = str(rng.choice(sources.PHOTOGRAPHS))
    return Thing("clutter", name, (x, y, x + side, y + side), source=int(rng.integers(2**31)))


def _crop(split: Split, name: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """Draw the corner and side in px of a square inside the split's strip of a photograph."""
    width, height = sources.photograph(split, name).size
    largest = min(width, height, 240)
    side = int(rng.integers(min(56, largest), largest + 1))
    return int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1)), side
