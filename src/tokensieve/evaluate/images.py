"""Open image files that may be damaged, too large or no images, with one clear error for each."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from tokensieve.errors import DataError

MAX_PIXELS = 100_000_000  # refused before decoding: 0.3 GB as RGB


def open_image(path: str | Path) -> Image.Image:
    """Open and decode an image file as RGB, with its EXIF rotation applied.

    Raises:
        DataError: no such file, not an image, damaged, or more pixels than :data:`MAX_PIXELS`.
    """
    return _decode(Path(path), str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """:func:`open_image` for the bytes of a file; ``name`` is used in errors."""
    return _decode(BytesIO(data), name)


def check_image(path: Path) -> None:
    """Refuse, without decoding, a file that is missing, no image, or too large."""
    with _errors(str(path)), _open(path, str(path)):
        pass


def _decode(file: Path | IO[bytes], name: str) -> Image.Image:
    with _errors(name), _open(file, name) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def _open(file: Path | IO[bytes], name: str) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the stated limit
        image = Image.open(file)
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(f"{name}: {width} x {height} px is too large; the limit is {MAX_PIXELS:,} pixels")
        yield image


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Turn the exceptions of Pillow into one line."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name}: no such image file") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image") from None
    except Image.DecompressionBombError as error:
        match = re.search(r"(\d+) pixels", str(error))  # Pillow gives the size of such an image in this text only
        size = f"{int(match[1]):,} pixels are too many" if match else "too large"
        raise DataError(f"{name}: {size}; the limit is {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: the image cannot be read ({reason})") from None
