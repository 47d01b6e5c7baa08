"""vLLM's own server with the plug-in: the options of its command line, and requests of clients."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tokensieve.reference.benchmark import benchmark
from tokensieve.reference.vilt import ASKED
from tokensieve.vllm import checkpoint, engine_options

ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """The address of a server in multi-process mode: the frontend and the engine are processes of their own."""
    overrides = engine_options("reference", "vtc-cls(keep=36)", allowed=["divprune(keep=36)"])["hf_overrides"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", checkpoint("reference"), "--served-model-name", "reference", "--port", str(port)]
    options += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    options += ["--hf-overrides", json.dumps(overrides), "--trust-request-mm-kwargs", "--max-num-seqs", "8"]
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as file:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
        server = subprocess.Popen(command, env={**os.environ, **ENV}, stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            if server.poll() is not None:
                pytest.fail(f"the server ended:\n{log.read_text()[-5000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            raise


def ask(address: str, number: int = 0, **options: Any) -> tuple[int, Any]:
    """Return the status and the body of one chat request about one question of the benchmark."""
    row, png = benchmark(scenes=2, types=ASKED)[number], io.BytesIO()
    row.image.save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row.question}]
    body = {"model": "reference", "temperature": 0, "max_tokens": 4, "messages": [{"role": "user", "content": content}]}
    data = json.dumps(body | options).encode()
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", data=data, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def answer(address: str, number: int = 0, **options: Any) -> tuple[str, int]:
    """Return the answer, and the tokens of the prompt."""
    status, reply = ask(address, number, **options)
    assert status == 200, reply
    return reply["choices"][0]["message"]["content"].strip(), reply["usage"]["prompt_tokens"]


def test_a_chat_request_is_reduced_by_the_engine_s_method_or_by_its_own(address):
    questions = range(7)
    right = [row.answer for row in benchmark(scenes=2, types=ASKED)]
    answers = [answer(address, number) for number in questions]
    assert sum(text == right[number] for number, (text, _) in enumerate(answers)) >= 5
    _, reduced = answers[0]
    for options, kept in (
        ({"tokensieve_keep": 20}, 20),
        ({"tokensieve_keep": 0.5}, 72),
        ({"tokensieve_keep": 1.0}, 144),
        ({"tokensieve_method": "divprune"}, 36),
        ({"tokensieve_method": "divprune", "tokensieve_keep": 9}, 9),
    ):
        _, tokens = answer(address, mm_processor_kwargs=options)
        assert tokens == reduced + kept - 36


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"tokensieve_keep": keep}
            for keep in ("x", "64", -1, 0, 1e9, 1.5, float("nan"), float("inf"), True, [3], None)
        ),
        {"tokensieve_keep": {"keep": 3}},
        {"tokensieve_method": "fastv"},
        {"tokensieve_method": "random"},
        {"tokensieve_method": ["divprune"]},
        {"tokensieve_kep": 3},
        {"tokensieve_plan": [0, 1, 1, 144, 12, 12]},
        {"size": {"shortest_edge": 60}, "crop_size": {"height": 60, "width": 60}},
    ],
    ids=str,
)
def test_a_wrong_option_is_the_client_s_error_and_harms_nobody(address, options):
    status, reply = ask(address, mm_processor_kwargs=options)
    assert 400 <= status < 500, reply
    assert ask(address)[0] == 200
