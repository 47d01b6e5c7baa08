"""Draw ``docs/pictures/pixelprune.png``: which tokens of a document, a table and a screen leave, and none of noise.

``python docs/make_pixelprune.py`` draws the pictures of ``benchmarks/pages.py``. Tokens that leave are shaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy
import torch
from PIL import Image

import tokensieve
from tokensieve.tokens import VisualTokens

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
SIDE, GRID, GAP = 32, (32, 24), 24  # pixels of a token, tokens of a picture, pixels between pictures
SHADE = numpy.array([214, 92, 60])


def main() -> None:
    from pages import draw

    height, width = SIDE * GRID[0], SIDE * GRID[1]
    kinds = ("document", "table", "screen", "noise")
    sheet = Image.new("RGB", (len(kinds) * (width + GAP) + GAP, height + 2 * GAP), (128, 128, 128))
    for number, kind in enumerate(kinds):
        pixels = numpy.asarray(draw(kind, 1, (width, height)), float)
        tokens = pixels.reshape(GRID[0], SIDE, GRID[1], SIDE, 3).swapaxes(1, 2)
        features = torch.from_numpy(tokens.reshape(1, GRID[0] * GRID[1], -1) / 255)
        (method,) = tokensieve.parse("pixelprune")
        leaves = numpy.ones(GRID[0] * GRID[1], dtype=bool)
        leaves[method(VisualTokens(features, grid=GRID))[0].kept.numpy()] = False
        shaded = leaves.reshape(GRID).repeat(SIDE, 0).repeat(SIDE, 1)
        pixels[shaded] = 0.55 * pixels[shaded] + 0.45 * SHADE
        sheet.paste(Image.fromarray(pixels.astype(numpy.uint8)), (GAP + number * (width + GAP), GAP))
    small = sheet.resize((sheet.width * 2 // 5, sheet.height * 2 // 5), Image.Resampling.LANCZOS)
    small.quantize(64).save(ROOT / "docs" / "pictures" / "pixelprune.png", optimize=True)


if __name__ == "__main__":
    main()
