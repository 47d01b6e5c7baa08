"""Take the address of a server before its model is loaded."""

from __future__ import annotations

import socket

from tokensieve.errors import Refusal


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, before the model is loaded.

    Raises:
        Refusal: the address is in use, or is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise Refusal(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener
