"""Draw the things of a scene with Pillow and NumPy, in about a millisecond per scene on one core."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from tokensieve.reference import sources
from tokensieve.reference.sources import Split
from tokensieve.reference.things import CANVAS, CELL, Thing
from tokensieve.reference.vocabulary import COLOURS, ICONS

_INK = (25, 25, 30)


def background(split: Split, name: str, crop: tuple[int, int, int], dim: float) -> Image.Image:
    """Return a canvas, RGB, with a dimmed square of a photograph: corner and side of the `crop` in px."""
    x, y, side = crop
    photograph = sources.photograph(split, name)
    square = photograph.resize((CANVAS, CANVAS), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    return Image.blend(Image.new("RGB", square.size), square, dim)


def draw(canvas: Image.Image, thing: Thing, split: Split) -> None:
    """Draw one thing of a scene of this split."""
    if thing.kind == "clutter":
        _draw_clutter(canvas, thing, split)
    elif thing.kind == "sign":
        _draw_sign(canvas, thing)
    else:
        _draw_object(canvas, thing)


def _draw_clutter(canvas: Image.Image, thing: Thing, split: Split) -> None:
    """Draw a bright piece of photograph: salient, but no question is about it."""
    left, top, right, _ = thing.box
    photograph = sources.photograph(split, thing.name)
    side = min(48, *photograph.size)
    rng = np.random.default_rng(thing.source)
    x, y = int(rng.integers(photograph.width - side + 1)), int(rng.integers(photograph.height - side + 1))
    size = (right - left, right - left)
    canvas.paste(photograph.resize(size, Image.Resampling.BILINEAR, box=(x, y, x + side, y + side)), (left, top))


def _draw_sign(canvas: Image.Image, thing: Thing) -> None:
    left, top, right, bottom = thing.box
    plate = Image.new("RGB", (right - left, bottom - top), (235, 235, 225))
    plate.paste(_INK, (3, 3), sources.word_mask(thing.name))
    under = canvas.crop(thing.box)
    canvas.paste(Image.blend(under, plate, thing.opacity), (left, top))


def _draw_object(canvas: Image.Image, thing: Thing) -> None:
    left, top, _, _ = thing.box
    size = thing.size
    if thing.kind == "digit":
        mask = sources.digit_mask(thing.source, size, thing.angle)
    else:
        mask = sources.glyph_mask(ICONS[thing.name], size)
    gap = (CELL - size) // 2
    colour = COLOURS[thing.colour]
    canvas.paste(colour, (left + gap, top + gap), mask.point([round(level * thing.opacity) for level in range(256)]))
    if thing.frame != "none":
        canvas.paste((215, 215, 215), (left, top), _frame_mask(thing.frame))


@cache
def _frame_mask(frame: str) -> Image.Image:
    """Return the thin frame around an object as an opacity mask of one cell."""
    mask = Image.new("L", (CELL, CELL))
    pen = ImageDraw.Draw(mask)
    end = CELL - 1
    if frame == "square":
        pen.rectangle((0, 0, end, end), outline=255)
    elif frame == "circle":
        pen.ellipse((0, 0, end, end), outline=255)
    elif frame == "line":
        pen.line((0, end, end, end), fill=255)
    elif frame == "corners":
        for x in (0, end):
            for y in (0, end):
                pen.line((x, y, x + (5 if x == 0 else -5), y), fill=255)
                pen.line((x, y, x, y + (5 if y == 0 else -5)), fill=255)
    return mask
