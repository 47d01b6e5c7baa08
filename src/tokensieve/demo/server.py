"""Serve the page from this machine alone: its files come from the installed packages, and nothing else is requested."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import webbrowser
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import fastapi
import gradio as gr
import uvicorn

from tokensieve.demo.cards import CSS
from tokensieve.demo.jobs import Jobs

THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
GRACE = 2  # seconds for open connections at the end
UPLOAD = 64 * 2**20  # bytes of an image
# the browser refuses requests to other machines, whatever a release of Gradio may link to
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"


def build_app(page: gr.Blocks) -> fastapi.FastAPI:
    """Return the application that serves the page at ``/``."""
    page.queue(max_size=64, api_open=False)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def keep_to_this_server(request: fastapi.Request, call_next: Callable[[Any], Any]) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    mounted: fastapi.FastAPI = gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        max_file_size=UPLOAD,
        ssr_mode=False,
        mcp_server=False,
        show_error=True,
        theme=THEME,
        css=CSS,
    )
    return mounted


def run(page: gr.Blocks, jobs: Jobs, listener: socket.socket, url: str, *, browser: bool) -> int:
    """Serve until Ctrl-C or SIGTERM; return the exit code. Threads may still compute then."""
    config = uvicorn.Config(build_app(page), log_level="critical", timeout_graceful_shutdown=GRACE)
    server = _Server(config, url if browser else None)
    server.run(sockets=[listener])
    jobs.cancel()
    jobs.wait(GRACE)
    return 130 if server.ended_by == signal.SIGINT else 0 if server.started else 1


class _Server(uvicorn.Server):
    """Opens the browser once it listens, and remembers the signal that ends it; uvicorn's own would raise it again."""

    def __init__(self, config: uvicorn.Config, url: str | None) -> None:
        super().__init__(config)
        self.url, self.ended_by = url, 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.url is not None and self.started:
            threading.Thread(target=webbrowser.open, args=[self.url], daemon=True).start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.ended_by = number
        self.handle_exit(number, frame)
