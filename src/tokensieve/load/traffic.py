"""Closed and open loops of requests, on the clock of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from tokensieve.load.client import Reply

Send: TypeAlias = Callable[[int], Awaitable[Reply]]
"""Sends the request of this number."""


@dataclass(frozen=True)
class Outcome:
    """One request. Times are seconds after the start of the run.

    Attributes:
        planned: start by the plan. All latencies count from it, so that a late start hides no waiting.
        sent: start in fact.
        first, last: its first and its last token.
        end: of the reply.
        tokens, prompt_tokens, failure, detail: as in :class:`tokensieve.load.Reply`.
    """

    planned: float
    sent: float
    first: float | None
    last: float | None
    end: float
    tokens: int
    prompt_tokens: int | None
    failure: str | None
    detail: str = ""

    @property
    def first_token_seconds(self) -> float | None:
        """Return the time to the first token."""
        return None if self.first is None else self.first - self.planned

    @property
    def seconds_per_token(self) -> float | None:
        """Return the mean time of a token after the first; ``None`` for fewer than two tokens."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    @property
    def seconds(self) -> float:
        """Return the time from the planned start to the end."""
        return self.end - self.planned


async def closed_loop(send: Send, count: int, users: int) -> list[Outcome]:
    """Send ``count`` requests; each user sends the next one when the previous one has ended."""
    clock = asyncio.get_running_loop().time
    start, numbers = clock(), iter(range(count))
    outcomes: dict[int, Outcome] = {}

    async def user() -> None:
        for number in numbers:  # the users share the iterator
            sent = clock()
            outcomes[number] = _outcome(await send(number), start, planned=sent, sent=sent)

    await asyncio.gather(*(user() for _ in range(min(users, count))))
    return [outcomes[number] for number in range(count)]


async def open_loop(send: Send, starts: Sequence[float]) -> list[Outcome]:
    """Send one request at each of these seconds after now, whether or not earlier ones have ended."""
    clock = asyncio.get_running_loop().time
    start = clock()

    async def arrive(number: int, planned: float) -> Outcome:
        await asyncio.sleep(planned - clock())
        sent = clock()
        return _outcome(await send(number), start, planned=planned, sent=sent)

    return await asyncio.gather(*(arrive(number, start + at) for number, at in enumerate(starts)))


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Return the seconds of Poisson arrivals with ``rate`` a second in the mean, the same for the same seed."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return np.cumsum(gaps).tolist()  # type: ignore[no-any-return]


def _outcome(reply: Reply, start: float, *, planned: float, sent: float) -> Outcome:
    first, last = (None if moment is None else moment - start for moment in (reply.first, reply.last))
    return Outcome(
        planned - start,
        sent - start,
        first,
        last,
        reply.end - start,
        reply.tokens,
        reply.prompt_tokens,
        reply.failure,
        reply.detail,
    )
