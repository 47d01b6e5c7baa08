"""Start a full and a reduced server of an engine on free ports, wait until both answer, and stop them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokensieve.budget import Budget
from tokensieve.errors import MissingExtra, Refusal

HALF_OF_A_GPU = 0.45  # vLLM's share for each of two servers; the rest is for their CUDA contexts
START_SECONDS = 900.0  # a large model is read from a slow disk, and its graphs are captured
STOP_SECONDS = 30.0
LOG_LINES = 3


@dataclass(frozen=True)
class Launch:
    """A server's command, without its port.

    Attributes:
        name: "full" or "reduced"; its log is ``name.log``.
        command: the words; "{port}" stands for the port.
    """

    name: str
    command: Sequence[str]


def launches(
    engine: str, model: str, method: str, keep: Budget, engine_args: Sequence[str], *, gpu: bool
) -> tuple[Launch, Launch]:
    """Return the commands of the full and of the reduced server.

    Args:
        engine: "vllm" or "transformers".
        engine_args: further words of both commands.
        gpu: whether they share a GPU; each vLLM server then gets half of its memory.

    Raises:
        MissingExtra: the engine is not installed.
        Refusal: an unknown engine, or a method that it cannot serve.
    """
    if engine == "vllm":
        return _vllm(model, method, keep, engine_args, gpu)
    if engine == "transformers":
        program = (sys.executable, "-m", "tokensieve", "serve", model, "--engine", engine, "--port", "{port}")
        return (
            Launch("full", (*program, "--method", "full", *engine_args)),
            Launch("reduced", (*program, "--method", method, "--keep", str(keep), *engine_args)),
        )
    raise Refusal(f"--engine takes vllm or transformers; got {engine!r}")


def _vllm(model: str, method: str, keep: Budget, engine_args: Sequence[str], gpu: bool) -> tuple[Launch, Launch]:
    if find_spec("vllm") is None:
        raise MissingExtra("--engine vllm needs vLLM", "vllm")
    from tokensieve.vllm import checkpoint, engine_options

    reduced, path = engine_options(model, method, keep=keep), checkpoint(model)
    # vLLM runs a released checkpoint as it is; the bundled model needs the plug-in's names of its weights
    full = {} if path == model else engine_options(model, "full")
    memory = () if not gpu or "--gpu-memory-utilization" in engine_args else ("--gpu-memory-utilization", HALF_OF_A_GPU)

    def launch(name: str, options: dict[str, Any]) -> Launch:
        words = ["-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", "{port}"]
        # both servers call the model by the same name, wherever its files are
        values = {"model": path, "served_model_name": model} | options
        for key, value in values.items():
            words.append(f"--{key.replace('_', '-')}")
            if value is not True:  # a switch has no value
                words.append(value if isinstance(value, str) else json.dumps(value))
        return Launch(name, (sys.executable, *words, *map(str, memory), *engine_args))

    return launch("full", full), launch("reduced", reduced)


@contextmanager
def launched(
    launches: Sequence[Launch],
    folder: Path,
    *,
    tell: Callable[[str], None],
    start_seconds: float = START_SECONDS,
) -> Iterator[list[str]]:
    """Start the servers one after the other, yield their addresses, and stop them, whatever happens.

    They start one by one because vLLM measures the free memory of its GPU while it starts.

    Args:
        folder: of their logs.
        tell: receives one line for each step.

    Raises:
        Refusal: a server ends, or does not answer in time; the message quotes the end of its log.
    """
    before = signal.signal(signal.SIGTERM, _leave)  # a terminated benchmark stops its servers as well
    try:
        with ExitStack() as servers:
            yield [servers.enter_context(_server(launch, folder, tell, start_seconds)) for launch in launches]
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _server(launch: Launch, folder: Path, tell: Callable[[str], None], start_seconds: float) -> Iterator[str]:
    folder.mkdir(parents=True, exist_ok=True)
    log, port = folder / f"{launch.name}.log", _free_port()
    command = [word.replace("{port}", str(port)) for word in launch.command]
    tell(f"starting the {launch.name} server; its log: {log}")
    with log.open("wb") as file:
        # a session of its own: Ctrl-C reaches this process only, which then stops the server in order
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, launch.name, log, start_seconds)
        yield url
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, name: str, log: Path, start_seconds: float) -> None:
    """Return when the server answers GET /health."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine
    deadline = time.monotonic() + start_seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Refusal(f"the {name} server ended with code {process.returncode}: {_end_of(log)}; log: {log}")
        try:
            with opener.open(f"{url}/health", timeout=5):
                return
        except OSError:  # not listening yet, or not ready (HTTP 503)
            time.sleep(0.2)
    raise Refusal(f"the {name} server did not answer within {start_seconds:g} seconds; log: {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server in order, then kill whatever is left of it and of its workers."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _end_of(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-LOG_LINES:]) or "its log is empty"


def _leave(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)
