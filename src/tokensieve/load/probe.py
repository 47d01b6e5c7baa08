"""Look at a server before the load: it must list models, take an image and stream; else one line says what it lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import aiohttp

from tokensieve.errors import Refusal, nearest
from tokensieve.load import prompts
from tokensieve.load.cells import Cell
from tokensieve.load.client import Reply, Side, chat, connections, message_of

# of vLLM and others: replies of the length asked for, and the numbers of tokens in the stream
WANTED: Mapping[str, Any] = {"stream_options": {"include_usage": True}, "ignore_eos": True}
REJECTED = ("HTTP 400", "HTTP 422")
TOKENS = 2


def base_url(option: str, text: str) -> str:
    """Return the address of a server without ``/v1``.

    Raises:
        Refusal: no http address.
    """
    url = text.strip().rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise Refusal(f"{option} takes an address such as http://127.0.0.1:8000; got {text!r}")
    return url


async def probe(side: Side, cell: Cell, *, timeout: float) -> tuple[Side, int | None]:
    """Return the side with its model's name and the fields that its server takes, and the prompt tokens of a request.

    Args:
        side: its model may be empty; the server's only model is used then.
        cell: decides the image and the words of the request.

    Raises:
        Refusal: the server cannot be reached, is no OpenAI-compatible server, serves several models or not this one,
            rejects images, or does not stream.
    """
    async with connections(timeout) as session:
        side = replace(side, model=await _model(session, side))
        turn = prompts.content(cell, f"probe {side.url}", "probe")
        for dropped in ((), ("ignore_eos",), ("stream_options",), tuple(WANTED)):
            fields = {key: value for key, value in WANTED.items() if key not in dropped} | dict(side.fields)
            reply = await chat(session, side.chat_url, prompts.body(side.model, turn, TOKENS, fields))
            if reply.failure is None:
                return replace(side, fields=fields), reply.prompt_tokens
            if reply.failure not in REJECTED:
                break
        words = await chat(session, side.chat_url, prompts.body(side.model, turn[1:], TOKENS, {}))
        raise Refusal(_reason(side, reply, words))


async def reads_budgets(side: Side, cell: Cell, *, timeout: float) -> bool:
    """Return whether the server reads ``tokensieve_keep``: it then rejects a budget of no tokens."""
    fields = {**side.fields, "mm_processor_kwargs": {"tokensieve_keep": 0}}
    async with connections(timeout) as session:
        turn = prompts.content(cell, f"budget {side.url}", "probe")
        reply = await chat(session, side.chat_url, prompts.body(side.model, turn, TOKENS, fields))
    return reply.failure in REJECTED


def same_fields(full: Side, reduced: Side) -> tuple[Side, Side]:
    """Return the sides with only those of the wanted fields that both servers take."""
    dropped = {key for key in WANTED if key not in full.fields or key not in reduced.fields}
    full, reduced = (
        replace(side, fields={key: value for key, value in side.fields.items() if key not in dropped})
        for side in (full, reduced)
    )
    return full, reduced


async def _model(session: aiohttp.ClientSession, side: Side) -> str:
    """Return the name of the side's model, or that of the only one of the server."""
    url = f"{side.url}/v1/models"
    try:
        async with session.get(url) as response:
            status, text = response.status, await response.text(errors="replace")
            listed = await response.json(content_type=None) if status == 200 else None
    except (TimeoutError, asyncio.TimeoutError):
        raise Refusal(f"the server {side.url} does not answer") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Refusal(f"the server {side.url} cannot be reached: {error}") from None
    except ValueError:
        raise Refusal(f"{side.url} is no OpenAI-compatible server: GET {url} is no JSON") from None
    if status in (401, 403):
        raise Refusal(f"the server {side.url} wants a key (HTTP {status}): set OPENAI_API_KEY")
    entries = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(entries, list):
        if status == 404 and side.model:  # some compatible servers have no list; the first request shows the truth
            return side.model
        raise Refusal(f"{side.url} is no OpenAI-compatible server: GET {url} gave HTTP {status} {message_of(text)!r}")
    names = [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]
    if not side.model:
        if len(names) == 1:
            return names[0]
        raise Refusal(f"{side.url} serves {len(names)} models ({', '.join(names) or 'none'}): name one with --model")
    if names and side.model not in names:
        raise Refusal(f"{side.url} does not serve the model {side.model!r}; {nearest(side.model, names)}")
    return side.model


def _reason(side: Side, with_image: Reply, words_only: Reply) -> str:
    """Return one line: whether the image is at fault, or any request fails."""
    failure = f"{with_image.failure}: {with_image.detail}" if with_image.detail else str(with_image.failure)
    if words_only.failure is None:
        return f"{side.url} answers questions, but not one with an image ({failure})"
    if with_image.failure == "HTTP 404":
        return f"{side.url} is no OpenAI-compatible server, or lacks the model {side.model!r} ({failure})"
    return f"{side.url} fails a streaming chat request ({failure})"
