"""One streaming chat request, timed: the times of its first and its last token, and the reason if it fails."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from tokensieve.errors import MissingExtra

try:
    import aiohttp
except ImportError as error:
    raise MissingExtra("a load test needs aiohttp", "load") from error

SideName: TypeAlias = Literal["full", "reduced"]
KEEP_ALIVE = 4.0  # seconds; uvicorn closes an idle connection after 5, and a request on a closed one is lost
DETAIL = 300  # most characters of a server's message


@dataclass(frozen=True)
class Side:
    """One of the two systems that take turns.

    Attributes:
        name: "full" or "reduced".
        url: of the server, without ``/v1``.
        model: its name for the server.
        fields: of the request's body, beside those of every chat request.
        description: in words, for the report.
    """

    name: SideName
    url: str
    model: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""

    @property
    def chat_url(self) -> str:
        """Return the address of the chat endpoint."""
        return f"{self.url}/v1/chat/completions"


@dataclass(frozen=True)
class Reply:
    """The timed reply to a request. Times are those of the event loop, in seconds.

    Attributes:
        end: of the reply, or of the failure.
        first, last: chunks with tokens; ``None`` if there was none.
        tokens: generated, from the server's ``usage``; the number of chunks where it sends none.
        prompt_tokens: from ``usage``.
        failure: its kind ("HTTP 400", "timeout", …); ``None`` if the reply is complete.
        detail: the server's message.
    """

    end: float
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    prompt_tokens: int | None = None
    failure: str | None = None
    detail: str = ""


@asynccontextmanager
async def connections(timeout: float) -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a session without a limit of connections; a request ends after ``timeout`` seconds."""
    key = os.environ.get("OPENAI_API_KEY")
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
        timeout=aiohttp.ClientTimeout(total=timeout),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    ) as session:
        yield session


async def chat(session: aiohttp.ClientSession, url: str, body: bytes) -> Reply:
    """Send one streaming request and read its reply to the end. A failure is returned, not raised."""
    clock = asyncio.get_running_loop().time
    stream = _Stream()
    try:
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
            if response.status != 200:
                text = (await response.text(errors="replace")).strip()
                return Reply(clock(), failure=f"HTTP {response.status}", detail=message_of(text))
            async for line in response.content:
                stream.read(line, clock())
    except (TimeoutError, asyncio.TimeoutError):  # two classes on Python 3.10
        return stream.reply(clock(), "timeout")
    except aiohttp.ClientConnectorError as error:
        return stream.reply(clock(), "no connection", str(error))
    except (aiohttp.ClientError, ConnectionError) as error:
        return stream.reply(clock(), "broken connection", str(error) or type(error).__name__)
    except ValueError as error:  # a line that is too long, or no JSON
        return stream.reply(clock(), "malformed reply", str(error))
    return stream.reply(clock())


def message_of(text: str) -> str:
    """Return the message in a server's error, in the forms of OpenAI and FastAPI; else the beginning of the text."""
    try:
        reply = json.loads(text)
        error = reply.get("error") or reply.get("message") or reply.get("detail") or text
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    text = " ".join(text.split())
    return text if len(text) <= DETAIL else f"{text[:DETAIL]}…"


class _Stream:
    """Reads the server-sent events of one reply."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self.chunks = 0
        self.usage: dict[str, Any] = {}
        self.ended = False
        self.error: str | None = None

    def read(self, line: bytes, moment: float) -> None:
        """Read one line that arrived at this moment.

        Raises:
            ValueError: it is no event of a chat.
        """
        if not line.startswith(b"data:"):
            return  # blank lines between events, comments that keep the connection alive
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            self.ended = True
            return
        event = json.loads(data)
        choices = event.get("choices") or [] if isinstance(event, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise ValueError("an event of the stream is no chunk of a chat")
        if event.get("error"):
            self.error = message_of(json.dumps(event))
        self.usage = event.get("usage") or self.usage
        for choice in choices:
            delta, finished = choice.get("delta") or {}, choice.get("finish_reason") is not None
            text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
            # a token can have no text, such as the first half of a character; the opening chunk, which names the role,
            # and the closing one, which has the reason of the end, hold a token only if they hold text
            if text or (delta and "role" not in delta and not finished):
                self.first = moment if self.first is None else self.first
                self.chunks += 1
                self.last = moment
            if finished:
                self.ended, self.last = True, moment

    def reply(self, end: float, failure: str | None = None, detail: str = "") -> Reply:
        """Return the reply, which ended at ``end``."""
        if failure is None and self.error is not None:
            failure, detail = "error in the stream", self.error
        elif failure is None and not self.ended:
            failure, detail = "cut off" if self.chunks else "no stream", "the reply is no complete stream of events"
        tokens = int(self.usage.get("completion_tokens") or self.chunks)
        first = self.last if self.first is None and tokens else self.first  # the only token may have no text
        if failure is None and first is None:
            failure, detail = "no token", "the reply holds no token"
        return Reply(end, first, self.last, tokens, self.usage.get("prompt_tokens"), failure, detail)
