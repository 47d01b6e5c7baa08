"""Drawing a scene with Pillow and NumPy: about a millisecond on one core."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from tokensieve.reference import sources
from tokensieve.reference.scenes import CANVAS, CELL, Scene, Thing
from tokensieve.reference.sources import Split
from tokensieve.reference.vocabulary import COLOURS, ICONS

_INK = (25, 25, 30)


def render(scene: Scene) -> Image.Image:
    """The scene's canvas, RGB: a dimmed photograph with its things on top."""
    canvas = _background(scene)
    for thing in scene.things:
        if thing.kind == "clutter":
            _draw_clutter(canvas, thing, scene.split)
        elif thing.kind == "sign":
            _draw_sign(canvas, thing)
        else:
            _draw_object(canvas, thing)
    return canvas


def _background(scene: Scene) -> Image.Image:
    x, y, side = scene.crop
    photograph = sources.photograph(scene.split, scene.photograph)
    crop = photograph.resize((CANVAS, CANVAS), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    return Image.blend(Image.new("RGB", crop.size), crop, scene.dim)


def _draw_clutter(canvas: Image.Image, thing: Thing, split: Split) -> None:
    """A bright piece of photograph: salient, and never asked about."""
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
    """The thin frame around an object as an opacity mask, one cell in size."""
    mask = Image.new("L", (CELL, CELL))
    draw = ImageDraw.Draw(mask)
    end = CELL - 1
    if frame == "square":
        draw.rectangle((0, 0, end, end), outline=255)
    elif frame == "circle":
        draw.ellipse((0, 0, end, end), outline=255)
    elif frame == "line":
        draw.line((0, end, end, end), fill=255)
    elif frame == "corners":
        for x in (0, end):
            for y in (0, end):
                draw.line((x, y, x + (5 if x == 0 else -5), y), fill=255)
                draw.line((x, y, x, y + (5 if y == 0 else -5)), fill=255)
    return mask
