"""Images of a data set: files, bytes inside a table, and URLs that are fetched on request."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote_to_bytes

from PIL import Image

from tokensieve.errors import DataError
from tokensieve.evaluate.fetch import fetch
from tokensieve.images import as_rgb, check_image, decode_image, image_errors, open_image

Picture: TypeAlias = Path | Callable[[], Image.Image]
"""A file, or a function that returns the image. Equal values are the same image."""

LONGEST_PATH = 4096  # a longer text is no file name, it is the image itself in base64


@dataclass(frozen=True)
class StoredImage:
    """An image file inside a table. Two with the same content are equal.

    Attributes:
        digest: of the content.
        read: returns the content.
    """

    digest: str
    read: Callable[[], bytes] = field(compare=False, repr=False)

    def __call__(self) -> Image.Image:
        """Return the decoded image."""
        return decode_image(self.read(), "the image")


@dataclass(frozen=True)
class FetchedImage:
    """An image on the web, fetched when it is opened first and kept in the cache folder."""

    url: str

    def __call__(self) -> Image.Image:
        """Return the decoded image."""
        return open_image(fetch(self.url))


def open_picture(picture: Picture) -> Image.Image:
    """Return the decoded image, 8-bit RGB; raise :class:`DataError` if it cannot be read."""
    if isinstance(picture, Path):
        return open_image(picture)
    with image_errors("the image"):
        image = picture()
    if not isinstance(image, Image.Image):
        raise DataError(f"the image: a PIL image is expected; got {type(image).__name__}")
    with image_errors("the image"):
        image.load()
    return as_rgb(image)


def picture_of(value: Any, folder: Path, read: Callable[[], Any], *, fetch_images: bool) -> Picture:
    """Return the image that a cell names or holds, checked without decoding it.

    Args:
        value: a file name, a ``data:`` URI, base64 text, a URL, bytes, or a dict of bytes and path (datasets).
        folder: folder that file names are relative to.
        read: returns ``value`` again, so that a table's bytes need not be kept twice.
        fetch_images: allow URLs.

    Raises:
        DataError: no image, or a URL that may not be fetched.
    """
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        # the datasets library stores images so: their content, or else their file
        key = "bytes" if value.get("bytes") is not None else "path"
        return picture_of(value.get(key), folder, lambda: read()[key], fetch_images=fetch_images)
    if isinstance(value, bytes):
        return _stored(value, read)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"the image is a file name; got {value!r:.100}")
    if re.match("data:", value, re.IGNORECASE):
        content = _data_uri(value)
        return _stored(content, lambda: content)
    if len(value) > LONGEST_PATH:
        content = _base64(value)
        return _stored(content, lambda: content)
    if re.match("https?://", value, re.IGNORECASE):
        if not fetch_images:
            raise DataError(f"{value:.200}: images on the web are not fetched; --fetch-images allows it")
        return FetchedImage(value)
    if scheme := re.match(r"([a-z][a-z0-9+.-]+)://", value, re.IGNORECASE):
        raise DataError(f"{value:.200}: {scheme[1]}:// is not supported; an image is a file name or an http(s) URL")
    path = folder / value
    check_image(path, str(path))
    return path


def _stored(content: bytes, read: Callable[[], bytes]) -> StoredImage:
    check_image(content, "the image")
    return StoredImage(hashlib.sha256(content).hexdigest(), read)


def _data_uri(value: str) -> bytes:
    head, comma, body = value.partition(",")
    if not comma:
        raise DataError(f"the image: a data: URI has a comma before its content; got {value[:60]!r}")
    return _base64(body) if head.lower().endswith(";base64") else unquote_to_bytes(body)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the image: not valid base64 ({error}); got {text[:40]!r}…") from None


def content_key(picture: Picture) -> str | None:
    """Return a digest of an image's content, or its URL; ``None`` for any other function.

    A file that cannot be read has the key "unreadable": opening it gives the error.
    """
    if isinstance(picture, StoredImage):
        return picture.digest
    if isinstance(picture, FetchedImage):
        return picture.url
    if not isinstance(picture, Path):
        return None
    try:
        stat = picture.stat()
        return _file_digest(picture, stat.st_size, stat.st_mtime_ns)
    except OSError:
        return "unreadable"


@cache
def _file_digest(path: Path, size: int, changed: int) -> str:
    """Digest the whole file, once per size and time of change: questions that share an image read it once."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
