"""Images of any kind as 8-bit RGB, and one clear error for each file that is damaged, too large or no image."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tokensieve.errors import DataError

MAX_PIXELS = 100_000_000  # refused before decoding: 0.3 GB as RGB
SIXTEEN_BIT = ("PNG", "PPM")  # formats whose wide integers are 16-bit, even where Pillow stores them in 32 bits


def open_image(path: str | Path) -> Image.Image:
    """Open and decode an image file as 8-bit RGB (see :func:`as_rgb`), with its EXIF rotation applied.

    Raises:
        DataError: no such file, not an image, damaged, or more pixels than :data:`MAX_PIXELS`.
    """
    return _decode(Path(path), str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """:func:`open_image` for the bytes of a file; ``name`` is used in errors."""
    return _decode(BytesIO(data), name)


def check_image(file: Path | bytes, name: str) -> None:
    """Refuse, without decoding, a file (or its bytes) that is missing, no image, or too large."""
    with image_errors(name), _open(BytesIO(file) if isinstance(file, bytes) else file, name):
        pass


def as_rgb(image: Image.Image, kind: str | None = None) -> Image.Image:
    """Return an image of any mode as 8-bit RGB. Values are scaled, never clipped; transparency is laid on white.

    - 16-bit grey: 0 … 65535 becomes 0 … 255.
    - Floating-point grey within 0 … 1: becomes 0 … 255. NaN becomes black, +inf white and -inf black.
    - Other floating-point grey, and 32-bit integers: the smallest value becomes 0 and the largest 255.

    Args:
        image: the image.
        kind: its file format; integers of a PNG or PPM are 16-bit, however Pillow stores them.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _wide_grey(image, kind)
    if image.mode == "La":  # Pillow converts premultiplied grey to LA only
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    colours = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def _wide_grey(image: Image.Image, kind: str | None) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)  # [H, W]
    low, high = 0.0, 65535.0
    if image.mode == "F" or (image.mode == "I" and kind not in SIXTEEN_BIT):
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        if image.mode == "F" and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
    shares = (values - low) / ((high - low) or 1.0)  # an image of one value has no range
    pixels = (np.nan_to_num(shares, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1) * 255).round().astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels[values == transparent] = 255
    return Image.fromarray(pixels).convert("RGB")


def _decode(file: Path | IO[bytes], name: str) -> Image.Image:
    with image_errors(name), _open(file, name) as image:
        kind = image.format
        image.load()
        upright = _upright(image)
    return as_rgb(upright, kind)


def _upright(image: Image.Image) -> Image.Image:
    """Return a copy with the EXIF rotation applied; without it, if the EXIF data are damaged but the pixels are not."""
    with suppress(Exception):  # Pillow's readers of damaged EXIF data raise many types
        return ImageOps.exif_transpose(image)
    return image.copy()


@contextmanager
def _open(file: Path | IO[bytes], name: str) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        # MAX_PIXELS is the stated limit, and damage that leaves the pixels whole needs no warning
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{name}: {width} x {height} px is too large; the limit is {MAX_PIXELS:,} pixels")
            _scale_transparent_colour(image)
            yield image


def _scale_transparent_colour(image: Any) -> None:
    """Scale the transparent colour of a PNG to 8 bits per channel: Pillow scales the pixels only."""
    colour = image.info.get("transparency")
    stored = image.tile[0][3] if image.format == "PNG" and image.tile else None
    if stored in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * (85 if stored == "L;2" else 17)
    elif stored == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Turn the exceptions of reading an image into one line."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except FileNotFoundError:
        if re.match("https?:/", name):  # a path has lost the second slash
            name = re.sub("^(https?:/)/?", r"\1/", name)
            raise DataError(f"{name}: images on the web are not fetched; save the image to a file") from None
        raise DataError(f"{name}: no such image file") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image, or of a kind that Pillow cannot read") from None
    except Image.DecompressionBombError as error:
        match = re.search(r"(\d+) pixels", str(error))  # Pillow gives the size of such an image in this text only
        size = f"{int(match[1]):,} pixels are too many" if match else "too large"
        raise DataError(f"{name}: {size}; the limit is {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders of damaged files raise many types
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{name}: the image cannot be read ({reason})") from error
