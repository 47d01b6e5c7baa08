"""The digits, photographs and glyphs of the scenes, which ordinary wheels ship, and their split between data sets.

Handwritten digits (scikit-learn) are divided by instance, photographs (scikit-image) by region: each photograph is cut
into three vertical strips. Nothing is downloaded.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokensieve.errors import MissingExtra, Refusal

if TYPE_CHECKING:
    from numpy.typing import NDArray

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# Share of each photograph's width, and of the digit instances, that belongs to each split.
_SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}

PHOTOGRAPHS: tuple[str, ...] = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg",
    "rocket.jpg", "text.png",
)  # fmt: skip


def missing(error: ImportError) -> MissingExtra:
    """Return a one-line error for a user without the optional data packages."""
    return MissingExtra(f"{error.name} is needed to draw reference scenes", "reference")


def check_split(split: str) -> Split:
    """Return `split` if it is one; raise a :class:`Refusal` that names the splits otherwise."""
    if split not in SPLITS:
        raise Refusal(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    return split


@lru_cache(maxsize=1)
def _digits() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing(error) from None
    return load_digits()


@cache
def digit_instances(split: Split, name: str) -> NDArray[np.int64]:
    """Return the indices `[n]` of the scikit-learn digits that show `name` and belong to `split`."""
    target = _digits().target
    low, high = _SHARES[split]
    rank = np.random.default_rng(0).permutation(len(target)) / len(target)
    return np.flatnonzero((target == int(name)) & (rank >= low) & (rank < high))


def digit_mask(instance: int, size: int, angle: float) -> Image.Image:
    """Return a handwritten digit as an opacity mask, `size` × `size` px, turned by `angle` degrees."""
    ink = np.clip(_digits().images[instance] * 17.0, 0, 255).astype(np.uint8)
    big = Image.fromarray(ink).resize((size, size), Image.Resampling.BICUBIC)
    return big.rotate(angle, Image.Resampling.BICUBIC) if angle else big


@cache
def photograph(split: Split, name: str) -> Image.Image:
    """Return the strip of a photograph that belongs to `split`, RGB."""
    try:
        import skimage
    except ImportError as error:
        raise missing(error) from None
    with Image.open(Path(skimage.__file__).parent / "data" / name) as opened:
        image = opened.convert("RGB")
    low, high = strip(split, image.width)
    return image.crop((low, 0, high, image.height))


def strip(split: Split, width: int) -> tuple[int, int]:
    """Return the columns `[low, high)` that belong to `split` in a photograph of `width` px."""
    low, high = _SHARES[split]
    return round(low * width), round(high * width)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans Bold at `size` px, which matplotlib ships."""
    try:
        import matplotlib
    except ImportError as error:
        raise missing(error) from None
    path = Path(matplotlib.__file__).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def glyph_mask(glyph: str, size: int) -> Image.Image:
    """Return a glyph as an opacity mask, its ink scaled to fit `size` × `size` px and centred."""
    left, top, right, bottom = font(64).getbbox(glyph)
    ink = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(ink).text((-left, -top), glyph, fill=255, font=font(64))
    scale = size / max(ink.size)
    small = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.LANCZOS)
    mask = Image.new("L", (size, size))
    mask.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return mask


@cache
def word_mask(word: str, size: int = 10) -> Image.Image:
    """Return a word in letters of `size` px as an opacity mask cropped to its ink."""
    left, top, right, bottom = font(size).getbbox(word)
    mask = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), word, fill=255, font=font(size))
    return mask
