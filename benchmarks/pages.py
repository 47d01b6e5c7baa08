"""Documents, tables and screens, drawn with Pillow from a seed: what PixelPrune is for. And noise, which it is not for.

``draw(kind, seed, size)`` returns an RGB image. Nothing is taken from a file: the words are made up of syllables.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy
from PIL import Image, ImageDraw, ImageFont

Size = tuple[int, int]
SYLLABLES = (
    *("ka", "lo", "mi", "ren", "ta", "vor", "sel", "du", "pi", "han", "gra", "ne", "tro"),
    *("li", "mos", "wa", "ter", "in", "sol", "be", "cu", "dat", "fe", "ro", "num"),
)
INKS = ((20, 20, 20), (30, 60, 120), (90, 30, 30))
BARS = ((52, 73, 94), (45, 95, 75), (110, 70, 120), (70, 70, 70))


def draw(kind: str, seed: int, size: Size = (768, 1024)) -> Image.Image:
    """Draw one picture of a kind in ``KINDS``; ``size`` is (width, height) in pixels."""
    return KINDS[kind](random.Random(f"{kind} {seed}"), size)


def _words(chance: random.Random, count: int) -> str:
    return " ".join("".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(count))


def _text(
    canvas: ImageDraw.ImageDraw, chance: random.Random, box: tuple[int, int, int, int], size: int, ink: object
) -> int:
    """Fill a box (left, top, right, bottom) with a paragraph; return where it ends."""
    left, top, right, bottom = box
    font, y = ImageFont.load_default(size), top
    while y + size <= bottom:
        line = _words(chance, 1)
        while canvas.textlength(line, font) < right - left:
            line += " " + _words(chance, 1)
        canvas.text((left, y), line.rpartition(" ")[0], ink, font)
        y += size * 3 // 2
    return y


def document(chance: random.Random, size: Size) -> Image.Image:
    """A page of a report: a title, paragraphs with gaps between them, and margins."""
    width, height = size
    page = Image.new("RGB", size, "white")
    canvas, margin, ink = ImageDraw.Draw(page), width // 9, chance.choice(INKS)
    canvas.text((margin, height // 14), _words(chance, 3).title(), ink, ImageFont.load_default(28))
    y = height // 14 + 60
    while y < height * chance.uniform(0.7, 0.95):
        lines = chance.randint(2, 7)
        y = _text(canvas, chance, (margin, y, width - margin, min(y + lines * 21, height - margin)), 14, ink) + 28
    canvas.text((width // 2, height - margin // 2), str(chance.randint(1, 300)), ink, ImageFont.load_default(12))
    return page


def table(chance: random.Random, size: Size) -> Image.Image:
    """A page with a table: rules, a shaded head, numbers in its cells."""
    width, height = size
    page = Image.new("RGB", size, "white")
    canvas, margin, columns, step = ImageDraw.Draw(page), width // 12, chance.randint(3, 6), chance.choice((32, 40, 48))
    most = max(1, min(18, (height - 2 * margin) // step - 2))
    rows = chance.randint(min(8, most), most)
    wide, font = (width - 2 * margin) // columns, ImageFont.load_default(15)
    canvas.text((margin, margin // 2), _words(chance, 4).capitalize(), "black", ImageFont.load_default(18))
    for row in range(rows + 1):
        y = 2 * margin + row * step
        if row == 0:
            canvas.rectangle((margin, y, margin + columns * wide, y + step), (225, 230, 240))
        canvas.line((margin, y, margin + columns * wide, y), (120, 120, 120))
        if row == rows:
            continue
        for column in range(columns):
            value = f"{chance.uniform(0, 999):.1f}" if row and column else _words(chance, 1)
            canvas.text((margin + column * wide + 8, y + step // 4), value, "black", font)
    for column in range(columns + 1):
        x = margin + column * wide
        canvas.line((x, 2 * margin, x, 2 * margin + rows * step), (120, 120, 120))
    return page


def screen(chance: random.Random, size: Size) -> Image.Image:
    """The window of an application: a title bar, a list at the side, panels with buttons and a little text."""
    width, height = size
    back, bar = chance.choice(((245, 246, 248), (255, 255, 255), (40, 42, 54))), chance.choice(BARS)
    ink = "white" if sum(back) < 300 else (40, 40, 40)
    page = Image.new("RGB", size, back)
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    canvas.rectangle((0, 0, width, 43), bar)
    canvas.text((16, 12), _words(chance, 2).title(), "white", ImageFont.load_default(16))
    for button, colour in enumerate(((255, 95, 86), (255, 189, 46), (39, 201, 63))):
        canvas.ellipse((width - 28 - 24 * button, 14, width - 14 - 24 * button, 28), colour)
    side = width // 4
    canvas.rectangle((0, 44, side, height), tuple(max(0, value - 14) for value in back))
    for entry in range(chance.randint(6, 14)):
        canvas.text((16, 64 + 34 * entry), _words(chance, 2), ink, font)
    y = 70
    while y < height - 160:
        tall = chance.randint(90, 220)
        box = (side + 24, y, width - 24, min(y + tall, height - 24))
        canvas.rounded_rectangle(box, 8, outline=(150, 155, 165), width=1)
        canvas.text((box[0] + 14, y + 12), _words(chance, 2).capitalize(), ink, ImageFont.load_default(15))
        lines = min(chance.randint(0, 3), (box[3] - y - 82) // 20)
        _text(canvas, chance, (box[0] + 14, y + 42, box[2] - 40, y + 42 + 20 * lines), 13, ink)
        canvas.rounded_rectangle((box[2] - 110, box[3] - 38, box[2] - 14, box[3] - 12), 5, bar)
        canvas.text((box[2] - 94, box[3] - 34), _words(chance, 1)[:9], "white", font)
        y += tall + 24
    return page


def noise(chance: random.Random, size: Size) -> Image.Image:
    """Soft shapes with the noise of a camera on top, as in a photograph: no two patches are equal."""
    width, height = size
    generator = numpy.random.default_rng(chance.randrange(2**32))
    coarse = generator.integers(0, 256, (height // 64 + 1, width // 64 + 1, 3), dtype=numpy.uint8)
    soft = numpy.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), float)
    return Image.fromarray((soft + generator.normal(0, 4, soft.shape)).clip(0, 255).astype(numpy.uint8))


def gradient(chance: random.Random, size: Size) -> Image.Image:
    """A slow gradient of colour across the picture: neighbours are nearly equal."""
    width, height = size
    x = numpy.linspace(0, 1, width)[None, :, None] * numpy.array([chance.uniform(20, 90) for _ in range(3)])
    y = numpy.linspace(0, 1, height)[:, None, None] * numpy.array([chance.uniform(0, 60) for _ in range(3)])
    return Image.fromarray((80 + x + y).round().astype(numpy.uint8))


KINDS: dict[str, Callable[[random.Random, Size], Image.Image]] = {
    "document": document,
    "table": table,
    "screen": screen,
    "noise": noise,
    "gradient": gradient,
}
