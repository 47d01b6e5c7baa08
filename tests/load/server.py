"""A chat server whose delays are known, and an event loop whose clock no machine drives."""

from __future__ import annotations

import asyncio
import json
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

GRACE = 0.003  # seconds that a byte may need between two sockets of this process


class VirtualLoop(asyncio.SelectorEventLoop):
    """Sleeps cost no time: where no socket has news, the clock jumps to the next timer."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__()
        select = self._selector.select

        def jump(timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if timeout is None or timeout <= 0:
                return select(timeout)
            events = select(GRACE)
            if not events:
                self.now += timeout
            return events

        self._selector.select = jump

    def time(self) -> float:
        return self.now


def run_virtual(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on a virtual clock."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


@dataclass
class FakeServer:
    """A chat server.

    Attributes:
        first, step: seconds until the first token, and of each further one, of a full request.
        workers: requests served at once; the others wait.
        models: listed names.
        rejected: fields that give HTTP 400.
        status: HTTP status of the n-th chat request; 200: it is answered.
        images: whether it takes images.
        budgets: whether it reads ``tokensieve_keep``: times and prompt tokens shrink with it.
        counts_after: whether prompt tokens are counted after the reduction.
        limit: most tokens of a reply.
    """

    first: float = 0.01
    step: float = 0.0
    workers: int = 1000
    models: tuple[str, ...] = ("toy",)
    rejected: tuple[str, ...] = ()
    status: Callable[[int], int] = lambda number: 200
    images: bool = True
    usage: bool = True
    budgets: bool = False
    counts_after: bool = True
    limit: int = 10**6
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        kinds = {part["type"] for part in body["messages"][0]["content"]}
        for name in self.rejected:
            if name in body:
                return _error(f"unexpected field {name}")
        if "image_url" in kinds and not self.images:
            return _error("this model takes no images")
        if body["model"] not in self.models:
            return _error("no such model", 404)
        status = self.status(len(self.bodies) - 1)
        if status != 200:
            return _error("out of order", status)
        keep = body.get("mm_processor_kwargs", {}).get("tokensieve_keep", 1.0) if self.budgets else 1.0
        if keep <= 0:
            return _error("tokensieve_keep must be above 0")
        async with self._turns:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            with suppress(ConnectionError):  # the client has left
                await self._stream(response, request, body, keep)
            return response

    async def _stream(
        self, response: web.StreamResponse, request: web.Request, body: dict[str, Any], keep: float
    ) -> None:
        await response.prepare(request)

        async def send(event: Any) -> None:
            await response.write(b"data: " + (event if event == b"[DONE]" else json.dumps(event).encode()) + b"\n\n")

        tokens = min(body["max_tokens"], self.limit)
        await send({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for number in range(tokens):
            await asyncio.sleep(keep * (self.step if number else self.first))
            # the second token is half of a character: it has no text
            await send({"choices": [{"delta": {"content": "" if number == 1 else "a"}, "finish_reason": None}]})
        await send({"choices": [{"delta": {}, "finish_reason": "length"}]})
        if self.usage and "stream_options" in body:
            prompt = 10 + round(100 * (keep if self.counts_after else 1))
            await send({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": tokens}})
        await send(b"[DONE]")

    async def start(self) -> web.AppRunner:
        """Listen on a free port of this machine, in the running loop."""
        self._turns = asyncio.Semaphore(self.workers)
        app = web.Application(client_max_size=2**26)
        app.add_routes([web.get("/v1/models", self.list_models), web.post("/v1/chat/completions", self.chat)])
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return runner

    @contextmanager
    def in_a_thread(self) -> Iterator[str]:
        """Serve on the clock of the machine, for a command in another process; yield the address."""
        loop, ready, end = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

        async def serve() -> None:
            runner = await self.start()
            ready.set()
            await end.wait()
            await runner.cleanup()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
        thread.start()
        assert ready.wait(20)
        try:
            yield self.url
        finally:
            loop.call_soon_threadsafe(end.set)
            thread.join(20)


def _error(message: str, status: int = 400) -> web.Response:
    return web.json_response({"error": {"message": message, "code": status}}, status=status)
