"""Fetch an image that a request names by URL: from public addresses only, without redirects, within size and time."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import SplitResult, urlsplit

from tokensieve.errors import DataError


def fetch(url: str, most_bytes: int, deadline: float) -> bytes:
    """Return the content of a URL.

    The name is resolved once, and the connection goes to that address: a name that resolves to a private address a
    moment later cannot lead into the server's network.

    Args:
        url: an http(s) URL.
        most_bytes: the largest content.
        deadline: moment of ``time.monotonic`` at which the content must have arrived.

    Raises:
        DataError: the address is not public, or the server does not send an image of the allowed size in time.
    """
    parts = _split(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    connection = _Pinned(_public_address(host, port, url), host, port, secure=parts.scheme == "https")
    connection.timeout = max(0.1, deadline - time.monotonic())
    try:
        connection.request("GET", f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}")
        response = connection.getresponse()
        if response.status != 200:
            kind = "a redirect, which is not followed" if 300 <= response.status < 400 else "an error"
            raise DataError(f"{url} cannot be fetched: the server answers {response.status}, {kind}")
        content = bytearray()
        # read1 returns what is there, so that a slow server cannot hold the loop beyond the deadline
        while block := response.read1(1 << 16):
            content += block
            if len(content) > most_bytes:
                raise DataError(f"{url} cannot be fetched: larger than {most_bytes:,} bytes")
            if time.monotonic() > deadline:
                raise DataError(f"{url} cannot be fetched: it did not arrive in time")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{url} cannot be fetched: {getattr(error, 'reason', None) or error}") from None
    finally:
        connection.close()
    return bytes(content)


def is_public(address: str) -> bool:
    """Return whether an IP address is of the public internet, also if it stands inside an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])  # the zone of a link-local address
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    return ip.is_global and not ip.is_multicast and (inner is None or is_public(str(inner)))


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises for a port that is no number
        if any(not 32 < ord(character) < 127 for character in url):
            raise ValueError("a URL has no spaces, and other characters are percent-encoded")
    except ValueError as error:
        raise DataError(f"{url[:80]!r} is not a URL: {error}") from None
    if not parts.hostname or parts.username is not None:
        raise DataError(f"{url[:80]} is not allowed: a URL names a host, and no user")
    return parts


def _public_address(host: str, port: int, url: str) -> str:
    """Return an address of the host; refuse a host that has any address that is not public."""
    try:
        found_addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DataError(f"{url} cannot be fetched: {error}") from None
    addresses = [str(entry[4][0]) for entry in found_addresses]
    for address in addresses:
        if not is_public(address):
            raise DataError(f"{url} is not allowed: {host} is the address {address}, which is not public")
    return addresses[0]


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, with the host's name in the request and in the check of its certificate."""

    def __init__(self, address: str, host: str, port: int, *, secure: bool) -> None:
        super().__init__(host, port)
        self._address, self._secure = address, secure
        self.default_port = 443 if secure else 80  # the port is left out of the header Host

    def connect(self) -> None:
        """Connect to the address that was checked."""
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
