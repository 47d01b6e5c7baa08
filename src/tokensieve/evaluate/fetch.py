"""Fetch images over HTTP into a cache folder. Nothing here runs unless the user allows it."""

from __future__ import annotations

import hashlib
import os
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.error import HTTPError

from tokensieve.errors import DataError
from tokensieve.images import check_image
from tokensieve.version import __version__

MAX_BYTES = 50_000_000
TIMEOUT = 20.0  # seconds, for the connection and for the whole of an image
TYPES = ("image/", "application/octet-stream", "binary/octet-stream")
HANDLERS = (
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.UnknownHandler,
)


def cache_folder() -> Path:
    """Return the folder of fetched images: ``tokensieve/images`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokensieve" / "images"


def fetch(url: str) -> Path:
    """Return the file of an image on the web, fetched once.

    Any host is allowed, hosts of the user's network included: the user allows fetching for a data set as a whole.

    Raises:
        DataError: the server does not answer in :data:`TIMEOUT` seconds, answers with an error or with no image, or
            sends more than :data:`MAX_BYTES`.
    """
    path = cache_folder() / hashlib.sha256(url.encode()).hexdigest()
    if path.is_file():
        return path
    content = _download(url)
    check_image(content, url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a reader in another process finds the whole file or none
        with NamedTemporaryFile(dir=path.parent, delete=False) as part:
            part.write(content)
        os.replace(part.name, path)
    except OSError as error:
        raise DataError(f"{url}: cannot be kept in {path.parent} ({error.strerror or error})") from None
    return path


def _download(url: str) -> bytes:
    opener = urllib.request.OpenerDirector()  # the default one would follow a redirect to ftp://
    for handler in HANDLERS:
        opener.add_handler(handler())
    deadline = time.monotonic() + TIMEOUT
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"tokensieve/{__version__}", "Accept": "image/*"})
        with opener.open(request, timeout=TIMEOUT) as response:
            kind = response.headers.get_content_type()
            if not kind.startswith(TYPES):
                raise DataError(f"{url}: not an image; the server sends {kind}")
            content = bytearray()
            # read1 returns what is there, so that a slow server cannot hold the loop beyond the deadline
            while block := response.read1(1 << 16):
                content += block
                if len(content) > MAX_BYTES:
                    raise DataError(f"{url}: larger than {MAX_BYTES / 1e6:.0f} MB")
                if time.monotonic() > deadline:
                    raise DataError(f"{url}: not complete after {TIMEOUT:.0f} seconds")
            missing = response.length  # bytes that were announced but not sent
    except HTTPError as error:
        reason = next(iter(str(error.reason).splitlines()), "")  # that of a circle of redirects has several lines
        with suppress(OSError):
            error.close()
        raise DataError(f"{url}: the server answers {error.code} ({reason})") from None
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(f"{url}: cannot be fetched ({getattr(error, 'reason', None) or error})") from None
    if missing:
        raise DataError(f"{url}: the connection ended {missing} bytes early")
    return bytes(content)
