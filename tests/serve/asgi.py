"""Calls of an ASGI app without a network, and requests to make."""

import asyncio
import base64
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from PIL import Image


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    blocks: list[bytes] = field(default_factory=list)

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(b"".join(self.blocks))["error"]


async def post(
    app: Any,
    body: Any,
    *,
    path: str = "/v1/chat/completions",
    method: str = "POST",
    headers: dict[str, str] | None = None,
    pace: Callable[[int], float] = lambda _: 0.0,
    block: int = 1 << 20,
    leave: asyncio.Event | None = None,
) -> Answer:
    """Send a request to an app.

    Args:
        body: bytes, or an object that is sent as JSON.
        pace: seconds to wait before each block of the body, by its number.
        leave: when it is set, the client goes away.
    """
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    blocks = [content[start : start + block] for start in range(0, len(content), block)] or [b""]
    fields = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in fields.items() if value],
    }
    answer, sent = Answer(), 0

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent < len(blocks):
            await asyncio.sleep(pace(sent))
            sent += 1
            return {"type": "http.request", "body": blocks[sent - 1], "more_body": sent < len(blocks)}
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answer.blocks.append(message["body"])

    await app(scope, receive, send)
    return answer


def png(width: int = 8, height: int = 8) -> bytes:
    file = BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """Return a PNG of some hundred bytes whose header declares many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def data_url(image: bytes | Image.Image) -> str:
    if isinstance(image, Image.Image):
        file = BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def chat(*urls: str, text: str = "what colour is the 1?", **more: Any) -> dict[str, Any]:
    """Return the body of a chat request about images."""
    content = [*map(picture, urls), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return {"model": "reference", "temperature": 0, "max_tokens": 4, "messages": messages} | more
