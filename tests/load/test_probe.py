"""A look at a server before the load: its model, the fields that it takes, and one clear line for what it lacks."""

import asyncio
import importlib
import re
import sys

import pytest
from aiohttp import web

from tests.load.server import FakeServer
from tokensieve.errors import MissingExtra, Refusal
from tokensieve.load import Cell, Side, base_url, probe, same_fields

CELL = Cell(32, 32, words=5, output_tokens=3, users=2)


def probed(server: FakeServer, model: str = "", **fields):
    async def work():
        runner = await server.start()
        try:
            return await probe(Side("full", server.url, model, fields), CELL, timeout=20)
        finally:
            await runner.cleanup()

    return asyncio.run(work())


def test_the_only_model_is_taken_and_the_fields_are_those_that_the_server_takes():
    side, tokens = probed(FakeServer())
    assert (side.model, tokens) == ("toy", 110)
    assert side.fields == {"stream_options": {"include_usage": True}, "ignore_eos": True}
    strict, tokens = probed(FakeServer(rejected=("ignore_eos",)), mm_processor_kwargs={})
    assert (tokens, set(strict.fields)) == (110, {"stream_options", "mm_processor_kwargs"})
    bare, tokens = probed(FakeServer(rejected=("ignore_eos", "stream_options")))
    assert (tokens, bare.fields) == (None, {})
    assert [dict(side.fields) for side in same_fields(side, bare)] == [{}, {}]
    assert same_fields(side, strict)[0].fields == {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("server", "model", "line"),
    [
        (FakeServer(models=("a", "b")), "", r"serves 2 models \(a, b\): name one with --model"),
        (FakeServer(models=()), "", r"serves 0 models \(none\)"),
        (FakeServer(models=("llava", "qwen")), "lava", r"does not serve the model 'lava'; did you mean llava\?"),
        (
            FakeServer(images=False),
            "",
            r"answers questions, but not one with an image \(HTTP 400: this model takes no images\)",
        ),
        (
            FakeServer(status=lambda number: 500),
            "",
            r"fails a streaming chat request \(HTTP 500: out of order\)",
        ),
        (FakeServer(limit=0), "", r"fails a streaming chat request \(no token"),
    ],
)
def test_what_a_server_lacks_is_named(server, model, line):
    with pytest.raises(Refusal, match=line):
        probed(server, model)


def other_server(answer) -> str:
    """Return the refusal of a server that answers every GET like this."""

    async def work():
        app = web.Application()
        app.add_routes([web.get("/{path:.*}", answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        try:
            await probe(Side("full", f"http://{host}:{port}", ""), CELL, timeout=20)
        finally:
            await runner.cleanup()

    with pytest.raises(Refusal) as refused:
        asyncio.run(work())
    return str(refused.value)


async def page(request):
    return web.Response(text="<html>It works!</html>")


async def missing(request):
    raise web.HTTPNotFound


async def other_json(request):
    return web.json_response({"models": []})


async def locked(request):
    raise web.HTTPUnauthorized


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (page, "is no OpenAI-compatible server: GET .*/v1/models is no JSON"),
        (missing, "is no OpenAI-compatible server: GET .*/v1/models gave HTTP 404"),
        (other_json, "is no OpenAI-compatible server"),
        (locked, r"wants a key \(HTTP 401\): set OPENAI_API_KEY"),
    ],
)
def test_other_servers_are_recognised(answer, line):
    assert re.search(line, other_server(answer))


def test_nobody_listens():
    with pytest.raises(Refusal, match=r"http://127.0.0.1:1 cannot be reached"):
        asyncio.run(probe(Side("full", "http://127.0.0.1:1", ""), CELL, timeout=20))


def test_a_key_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    keys = []

    async def answer(request):
        keys.append(request.headers.get("Authorization"))
        raise web.HTTPForbidden

    other_server(answer)
    assert keys == ["Bearer secret"]


@pytest.mark.parametrize("text", ["http://h:1", "http://h:1/", "http://h:1/v1", " http://h:1/v1/ "])
def test_addresses_have_one_form(text):
    assert base_url("--server", text) == "http://h:1"


@pytest.mark.parametrize("text", ["", "localhost:8000", "ftp://h", "/tmp/socket"])
def test_other_addresses_are_refused(text):
    with pytest.raises(Refusal, match="--server takes an address such as"):
        base_url("--server", text)


def test_without_aiohttp_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "tokensieve.load.client")
    with pytest.raises(MissingExtra, match=r"a load test needs aiohttp: .*\[load\]"):
        importlib.import_module("tokensieve.load.client")
