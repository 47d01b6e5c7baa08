"""Measured times are the server's delays, on a virtual clock over real sockets; arrivals are Poisson and seeded."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.load.server import FakeServer, run_virtual
from tokensieve.load import Cell, Reply, Side, arrivals, closed_loop, open_loop, prompts
from tokensieve.load.client import chat, connections, message_of
from tokensieve.load.figures import RunFigures

CELL = Cell(32, 32, words=5, output_tokens=9, users=3)
EXACT = pytest.approx


def measured(server: FakeServer, *, count: int, starts: Sequence[float] | None = None, users: int = 1, tokens: int = 9):
    """Send requests to a server on a virtual clock."""

    async def work():
        runner = await server.start()
        turn = prompts.content(CELL, "image", "question")
        body = prompts.body("toy", turn, tokens, {"stream_options": {"include_usage": True}})
        async with connections(1000.0) as session:

            def send(number: int):
                return chat(session, Side("full", server.url, "toy").chat_url, body)

            outcomes = await (closed_loop(send, count, users) if starts is None else open_loop(send, starts))
        await runner.cleanup()
        return outcomes

    return run_virtual(work())


def test_a_closed_loop_measures_the_servers_delays():
    outcomes = measured(FakeServer(first=0.4, step=0.05), count=12, users=3)
    service = 0.4 + 8 * 0.05
    for outcome in outcomes:
        assert outcome.failure is None
        assert outcome.first_token_seconds == EXACT(0.4)
        assert outcome.seconds_per_token == EXACT(0.05)
        assert outcome.seconds == EXACT(service)
        assert (outcome.tokens, outcome.prompt_tokens) == (9, 110)
    figures = RunFigures.of(outcomes)
    assert figures.requests_per_second == EXACT(3 / service)
    assert figures.output_tokens_per_second == EXACT(9 * 3 / service)
    assert (figures.first_token_ms, figures.token_ms) == (EXACT(400), EXACT(50))
    assert figures.late_ms == EXACT(0)


def test_a_user_waits_for_the_previous_reply():
    outcomes = measured(FakeServer(first=1.0), count=5, users=1, tokens=1)
    assert [outcome.planned for outcome in outcomes] == EXACT([0, 1, 2, 3, 4])
    assert all(outcome.seconds_per_token is None for outcome in outcomes)


def test_an_open_loop_sends_on_time_and_counts_the_waiting():
    """One worker of one second: the latency follows the queue, and no start waits for an earlier reply."""
    starts = [0.0, 0.25, 0.5, 5.0]
    outcomes = measured(FakeServer(first=1.0, workers=1), count=4, starts=starts, tokens=1)
    assert [outcome.sent for outcome in outcomes] == EXACT(starts)
    assert [outcome.end for outcome in outcomes] == EXACT([1.0, 2.0, 3.0, 6.0])
    assert [outcome.seconds for outcome in outcomes] == EXACT([1.0, 1.75, 2.5, 1.0])
    assert [outcome.first_token_seconds for outcome in outcomes] == EXACT([1.0, 1.75, 2.5, 1.0])


def test_a_late_start_counts_from_the_plan():
    """A generator that is blocked for two seconds reports them, instead of leaving the waiting out."""

    async def work():
        loop = asyncio.get_running_loop()

        async def send(number: int) -> Reply:
            if number == 0:
                loop.now += 2.0  # this process computes, and sends nothing
            return Reply(loop.time(), first=loop.time(), last=loop.time(), tokens=1)

        return await open_loop(send, [0.0, 0.5])

    _, second = run_virtual(work())
    assert (second.planned, second.sent) == (EXACT(0.5), EXACT(2.0))
    assert second.first_token_seconds == EXACT(1.5)
    assert RunFigures.of([second]).late_ms == EXACT(1500)


def test_arrivals_are_poisson_and_seeded():
    times = arrivals(4.0, 20_000, seed=3)
    assert times == arrivals(4.0, 20_000, seed=3)
    assert times != arrivals(4.0, 20_000, seed=4)
    gaps = np.diff([0.0, *times])
    assert (gaps > 0).all()
    assert gaps.mean() == EXACT(1 / 4, rel=0.03)
    assert gaps.std() == EXACT(1 / 4, rel=0.05)  # of an exponential distribution: its mean
    assert (gaps > 1 / 4).mean() == EXACT(np.exp(-1), abs=0.02)
    counts = np.bincount(np.floor(times).astype(int))[:-1]  # arrivals in each second: variance = mean
    assert counts.var() / counts.mean() == EXACT(1, abs=0.1)


@pytest.mark.parametrize(("status", "kind"), [(400, "HTTP 400"), (429, "HTTP 429"), (503, "HTTP 503")])
def test_failures_are_counted_by_kind(status, kind):
    server = FakeServer(first=0.5, status=lambda number: status if number % 2 else 200)
    figures = RunFigures.of(measured(server, count=8, users=1))
    assert figures.failures == {kind: 4}
    assert figures.requests == 8
    assert figures.requests_per_second == EXACT(4 / (4 * 0.5))  # only replies count, but the time runs on


def test_a_slow_reply_times_out():
    async def work():
        server = FakeServer(first=50.0)
        runner = await server.start()
        async with connections(10.0) as session:
            body = prompts.body("toy", prompts.content(CELL, "image", "question"), 4, {})
            reply = await chat(session, f"{server.url}/v1/chat/completions", body)
        await runner.cleanup()
        return reply

    assert run_virtual(work()).failure == "timeout"


def test_nobody_listens():
    async def work():
        async with connections(10.0) as session:
            return await chat(session, "http://127.0.0.1:1/v1/chat/completions", b"{}")

    assert asyncio.run(work()).failure == "no connection"


def streamed(*lines: bytes) -> Reply:
    """Return the reply of a server that sends these bytes."""

    async def work():
        async def answer(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"".join(lines))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, connections(10.0) as session:
            return await chat(session, f"http://127.0.0.1:{port}/v1/chat/completions", b"{}")

    return asyncio.run(work())


TOKEN = b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("lines", "failure"),
    [
        ([TOKEN, DONE], None),
        ([TOKEN], "cut off"),
        ([DONE], "no token"),
        ([b'data: {"choices": [{"delta": {"content": ""}, "finish_reason": "length"}]}\n\n', DONE], "no token"),
        (
            [
                b'data: {"choices": [{"delta": {"content": ""}, "finish_reason": "length"}], "usage": '
                b'{"completion_tokens": 1}}\n\n',
                DONE,
            ],
            None,
        ),  # a special token has no text
        ([b'{"choices": [{"message": {"content": "a"}}]}'], "no stream"),
        ([b"data: {broken\n\n"], "malformed reply"),
        ([b'data: [1, "a"]\n\n'], "malformed reply"),
        ([b'data: {"choices": [1]}\n\n'], "malformed reply"),
        ([TOKEN, b'data: {"error": {"message": "engine is dead"}}\n\n'], "error in the stream"),
        ([b'data: {"choices": [{"delta": {"reasoning_content": "so"}}]}\n\n', DONE], None),
        ([b": keep-alive\n\n", TOKEN, b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'], None),
    ],
)
def test_replies_that_are_no_streams_have_a_kind(lines, failure):
    reply = streamed(*lines)
    assert reply.failure == failure
    assert reply.tokens == (1 if failure in (None, "cut off", "error in the stream") else 0)


def test_a_server_without_usage_has_its_chunks_counted():
    (outcome,) = measured(FakeServer(first=0.1, step=0.1, usage=False), count=1)
    assert (outcome.tokens, outcome.prompt_tokens) == (9, None)
    assert outcome.seconds_per_token == EXACT(0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"error": {"message": "too  long"}}', "too long"),
        ('{"detail": "nothing here"}', "nothing here"),
        ('{"message": "old form"}', "old form"),
        ("<html>oops</html>", "<html>oops</html>"),
        ("x" * 1000, "x" * 300 + "…"),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_a_servers_message_is_one_short_line(text, message):
    assert message_of(text) == message


def test_every_image_differs_unless_it_shall_repeat():
    def images(turns):
        return [turn[0]["image_url"]["url"] for turn in turns]

    one = prompts.contents(CELL, 20, repeat_share=0.0, key="round 1", pool_key="pool", seed=0)
    two = prompts.contents(CELL, 20, repeat_share=0.0, key="round 2", pool_key="pool", seed=0)
    assert len({*images(one), *images(two)}) == 40
    assert one == prompts.contents(CELL, 20, repeat_share=0.0, key="round 1", pool_key="pool", seed=0)
    half = prompts.contents(CELL, 20, repeat_share=0.5, key="round 1", pool_key="pool", seed=0)
    pool = set(images(prompts.pool(CELL, "pool")))
    assert sum(image in pool for image in images(half)) == 10
    assert len({turn[1]["text"] for turn in half}) == 20  # other questions about the same images


def test_a_request_has_the_size_the_words_and_the_length():
    import base64
    import io

    from PIL import Image

    cell = replace(CELL, width=48, height=30, words=7)
    body = json.loads(prompts.body("toy", prompts.content(cell, "a", "b"), 9, {"ignore_eos": True}))
    picture, text = body["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].partition("base64,")[2])
    assert Image.open(io.BytesIO(data)).size == (48, 30)
    assert len(text["text"].split()) == 7
    assert (body["max_tokens"], body["stream"], body["ignore_eos"], body["model"]) == (9, True, True, "toy")
