"""The guard: one ASGI middleware before either engine. It bounds, checks and counts requests, and refuses the bad ones.

A request passes these steps: its path, its size, the arrival of its body in time, its JSON, a place in the engine. The
engine receives the JSON that was checked, serialised again, so that two parsers cannot disagree about it. The answer
passes through as the engine sends it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from tokensieve.serve.body import Rejection, check, read_json
from tokensieve.serve.metrics import Prefill, Requests, ServerMetrics
from tokensieve.serve.settings import Settings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

CHAT = "/v1/chat/completions"
DRAIN_SECONDS = 5.0  # a client that sends a body beyond the limit reads the answer only after sending


class Guard:
    """Stands before an engine's app.

    Args:
        app: the engine's ASGI app.
        settings: limits and options; ``None`` reads the environment variable, as vLLM gives no arguments.
        registry: the registry of the metrics; ``None`` is the one that vLLM shows at ``/metrics``.
        prefill: the measured prefills of the embedded engine.
    """

    def __init__(
        self,
        app: App,
        settings: Settings | None = None,
        registry: CollectorRegistry | None = None,
        prefill: Prefill | None = None,
    ) -> None:
        from prometheus_client import REGISTRY

        self._app = app
        self._settings = Settings.from_environment() if settings is None else settings
        self._places = asyncio.Semaphore(self._settings.limits.concurrency)
        self._threads = ThreadPoolExecutor(self._settings.limits.receiving, thread_name_prefix="checking")
        self.requests = Requests()
        ServerMetrics(self.requests, REGISTRY if registry is None else registry, prefill)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "web sockets are not served"})
        elif scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
        else:
            await self._guarded(scope, receive, send)

    async def _guarded(self, scope: Message, receive: Receive, send: Send) -> None:
        outcome = "failed"
        answer = _Answer(send)
        try:
            scope, body = await self._read(scope, receive)
            await self._run(scope, body, receive, answer)
            outcome = "failed" if answer.status >= 500 else "rejected" if answer.status >= 400 else "answered"
            if outcome == "rejected":
                self.requests.rejections["engine"] += 1
        except Rejection as rejection:
            outcome = "rejected"
            self.requests.rejections[rejection.reason] += 1
            await self._reject(rejection, send)
        except _Gone:
            outcome = "cancelled"
        finally:
            self.requests.outcomes[outcome] += 1

    # -- reading ------------------------------------------------------------------------------------------------------

    async def _read(self, scope: Message, receive: Receive) -> tuple[Message, bytes]:
        """Return the checked body, and the scope that belongs to it."""
        limits, requests = self._settings.limits, self.requests
        if scope["path"] != CHAT and scope["path"] not in self._settings.paths:
            paths = ", ".join((CHAT, *self._settings.paths))
            raise Rejection(404, "not_served", f"{scope['method']} {scope['path'][:80]} is not served; served: {paths}")
        if requests.receiving >= limits.receiving:
            raise Rejection(
                503, "busy", f"{requests.receiving} requests are arriving; the limit is {limits.receiving}: try again"
            )
        requests.receiving += 1
        try:
            headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
            _check_headers(headers)
            content = await _read_body(headers, receive, limits.body_bytes, limits.body_seconds)
            if scope["path"] == CHAT:
                # a thread for each, so that neither a large body nor a slow host holds up another request
                content = await asyncio.get_running_loop().run_in_executor(self._threads, self._checked, content)
        finally:
            requests.receiving -= 1
        # one length of the body that is passed on, whatever the client declared
        kept_headers = [
            pair for pair in scope["headers"] if pair[0].lower() not in (b"content-length", b"transfer-encoding")
        ]
        length = (b"content-length", str(len(content)).encode())
        return {**scope, "headers": [*kept_headers, length]}, content

    def _checked(self, content: bytes) -> bytes:
        return json.dumps(check(read_json(content), self._settings)).encode()

    # -- running ------------------------------------------------------------------------------------------------------

    async def _run(self, scope: Message, body: bytes, receive: Receive, answer: _Answer) -> None:
        """Run the engine when it has a place. A client that goes away ends it.

        Raises:
            Rejection: too many requests wait.
            _Gone: the client went away.
        """
        requests, limits = self.requests, self._settings.limits
        if requests.waiting + requests.running >= limits.concurrency + limits.queue:
            raise Rejection(
                429,
                "busy",
                f"{requests.running} requests run and {requests.waiting} wait; the limits are {limits.concurrency} and "
                f"{limits.queue}: try again later",
            )
        left_event = asyncio.Event()  # set when the client goes away
        engine = asyncio.ensure_future(self._in_place(scope, _replay(body, left_event), answer))
        watcher = asyncio.ensure_future(_until_gone(receive, left_event))
        try:
            await asyncio.wait({engine, watcher}, return_when=asyncio.FIRST_COMPLETED)
            gone = not engine.done() and not answer.complete
            if gone:
                engine.cancel()
            with suppress(asyncio.CancelledError):
                await engine
            if gone:
                raise _Gone
        finally:  # also when the server itself ends this request
            watcher.cancel()
            engine.cancel()
            await asyncio.gather(engine, watcher, return_exceptions=True)

    async def _in_place(self, scope: Message, receive: Receive, answer: _Answer) -> None:
        requests = self.requests
        requests.waiting += 1
        try:
            await self._places.acquire()
        finally:
            requests.waiting -= 1
        requests.running += 1
        start = time.monotonic()
        try:
            await self._app(scope, receive, answer)
            requests.seconds += time.monotonic() - start
        finally:
            requests.running -= 1
            self._places.release()

    async def _reject(self, rejection: Rejection, send: Send) -> None:
        """Answer with an error in the form of OpenAI's."""
        error = {
            "message": str(rejection),
            "type": "server_busy" if rejection.reason == "busy" else "invalid_request_error",
            "param": None,
            "code": rejection.reason,
        }
        headers = [(b"content-type", b"application/json")]
        if rejection.reason == "busy":
            headers.append((b"retry-after", str(self._retry_after()).encode()))
        if rejection.status in (408, 413):  # the body was not read to its end
            headers.append((b"connection", b"close"))
        body = json.dumps({"error": error}).encode()
        headers.append((b"content-length", str(len(body)).encode()))
        with suppress(OSError):  # the client is gone
            await send({"type": "http.response.start", "status": rejection.status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _retry_after(self) -> int:
        """Return the seconds in which the waiting requests are answered, at the mean pace so far."""
        answered = self.requests.outcomes["answered"]
        pace = self.requests.seconds / answered / self._settings.limits.concurrency if answered else 0.0
        return max(1, round(self.requests.waiting * pace))


class _Gone(Exception):
    """The client went away."""


class _Answer:
    """Passes an answer on, and remembers its status and its end."""

    def __init__(self, send: Send) -> None:
        self._send, self.status, self.complete = send, 0, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True


def _check_headers(headers: dict[bytes, str]) -> None:
    kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page in a browser can send other types to any server
        raise Rejection(415, "not_json", f"the Content-Type must be application/json; got {kind[:80]!r}")
    coding = headers.get(b"content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise Rejection(415, "not_json", f"the body must not be compressed; got Content-Encoding {coding[:80]!r}")


async def _read_body(headers: dict[bytes, str], receive: Receive, most: int, seconds: float) -> bytes:
    """Return the body.

    Raises:
        Rejection: it is too large, or does not arrive in time.
        _Gone: the client went away.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    declared = headers.get(b"content-length", "")
    size = int(declared) if declared.isascii() and declared.isdigit() else 0
    too_large = Rejection(413, "body_too_large", f"the body has more than {most:,} bytes, which is the limit")
    if size > most:
        too_large = Rejection(413, "body_too_large", f"the body has {size:,} bytes; the limit is {most:,}")
    body, more, received = bytearray(), True, 0
    while more:
        excess = size > most or received > most
        try:
            budget = DRAIN_SECONDS if excess else seconds
            message = await asyncio.wait_for(receive(), max(0.0, start + min(budget, seconds) - loop.time()))
        except asyncio.TimeoutError:  # the builtin is another class before Python 3.11
            if excess:
                raise too_large from None
            raise Rejection(
                408, "slow_body", f"{received:,} bytes of the body arrived in {seconds:g} seconds, which is the limit"
            ) from None
        if message["type"] == "http.disconnect":
            raise _Gone
        block, more = message.get("body", b""), message.get("more_body", False)
        received += len(block)
        if received <= most and size <= most:
            body += block
        else:
            body.clear()
    if size > most or received > most:
        raise too_large
    return bytes(body)


def _replay(body: bytes, left_event: asyncio.Event) -> Receive:
    """Return the ``receive`` of a request whose body has arrived."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await left_event.wait()
        return {"type": "http.disconnect"}

    return receive


async def _until_gone(receive: Receive, left_event: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    left_event.set()
