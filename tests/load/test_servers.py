"""The servers of an engine start one by one, their logs are kept, and they end with the benchmark."""

import os
import signal
import sys
import time
import types
import urllib.request

import pytest

from tokensieve.errors import MissingExtra, Refusal
from tokensieve.load import Launch, launched, launches, servers

# answers every GET; its child, such as an engine's worker, ignores the request to end
SERVER = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"])
print("child", child.pid, flush=True)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
GOOD = (sys.executable, "-c", SERVER, "{port}")


def exists(pid: int) -> bool:
    """Return whether a process runs; one that waits to be collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads the processes of Linux")
def test_servers_answer_inside_and_are_gone_outside(tmp_path):
    told: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with launched([Launch("full", GOOD), Launch("reduced", GOOD)], tmp_path, tell=told.append) as urls:
        assert len(set(urls)) == 2
        for url in urls:
            assert urllib.request.urlopen(url, timeout=10).read() == b"ok"
        pids = [int((tmp_path / f"{name}.log").read_text().split()[1]) for name in ("full", "reduced")]
        assert all(map(exists, pids))
    assert [line.split(";")[0] for line in told] == ["starting the full server", "starting the reduced server"]
    deadline = time.monotonic() + 20
    while any(map(exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(exists, pids)), "workers of a server outlive it"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_terminated_benchmark_stops_its_servers(tmp_path):
    def benchmark():
        with launched([Launch("full", GOOD)], tmp_path, tell=str) as urls:
            started.extend(urls)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    started: list[str] = []
    with pytest.raises(SystemExit):
        benchmark()
    (url,) = started
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=10)


def test_a_server_that_ends_shows_the_end_of_its_log(tmp_path):
    bad = Launch("full", (sys.executable, "-c", "import sys; print('loading'); sys.exit('out of memory')"))
    with (
        pytest.raises(Refusal, match=r"the full server ended with code 1: loading \| out of memory; log: .*full.log"),
        launched([bad], tmp_path, tell=str),
    ):
        pass


def test_a_server_that_never_answers(tmp_path):
    slow = Launch("full", (sys.executable, "-c", "import time; time.sleep(60)"))
    with (
        pytest.raises(Refusal, match=r"the full server did not answer within 0.5 seconds"),
        launched([slow], tmp_path, tell=str, start_seconds=0.5),
    ):
        pass


def test_the_commands_of_transformers():
    full, reduced = launches("transformers", "m", "divprune", 0.25, ["--dtype", "float32"], gpu=False)
    start = (sys.executable, "-m", "tokensieve", "serve", "m", "--engine", "transformers", "--port", "{port}")
    assert full.command == (*start, "--method", "full", "--dtype", "float32")
    assert reduced.command == (*start, "--method", "divprune", "--keep", "0.25", "--dtype", "float32")


@pytest.fixture
def vllm(monkeypatch):
    """Pretend that vLLM and the plug-in are installed."""

    def engine_options(model, method, *, keep=None):
        return {"hf_overrides": {"method": method, "keep": keep}, "trust_remote_code": True}

    plugin = types.ModuleType("tokensieve.vllm")
    plugin.engine_options = engine_options
    plugin.checkpoint = lambda model: "/folder" if model == "reference" else model
    monkeypatch.setitem(sys.modules, "tokensieve.vllm", plugin)
    monkeypatch.setattr(servers, "find_spec", lambda name: plugin)


def test_the_commands_of_vllm(vllm):
    full, reduced = launches("vllm", "m", "divprune", 64, ["--dtype", "float32"], gpu=True)
    start = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", "{port}",
             "--model", "m", "--served-model-name", "m")  # fmt: skip
    end = ("--gpu-memory-utilization", "0.45", "--dtype", "float32")
    assert full.command == (*start, *end), "the full side is a plain vLLM"
    overrides = ("--hf-overrides", '{"method": "divprune", "keep": 64}', "--trust-remote-code")
    assert reduced.command == (*start, *overrides, *end)
    on_cpu, _ = launches("vllm", "m", "divprune", 64, [], gpu=False)
    assert "--gpu-memory-utilization" not in on_cpu.command
    bundled, _ = launches("vllm", "reference", "divprune", 64, [], gpu=False)
    assert bundled.command[7:11] == ("--model", "/folder", "--served-model-name", "reference")
    assert bundled.command[11:13] == ("--hf-overrides", '{"method": "full", "keep": null}')
    asked, _ = launches("vllm", "m", "divprune", 64, ["--gpu-memory-utilization", "0.3"], gpu=True)
    assert asked.command.count("--gpu-memory-utilization") == 1


def test_engines_that_are_not_there(monkeypatch):
    monkeypatch.setattr(servers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="needs vLLM"):
        launches("vllm", "m", "divprune", 64, [], gpu=False)
    with pytest.raises(Refusal, match="takes vllm or transformers; got 'sglang'"):
        launches("sglang", "m", "divprune", 64, [], gpu=False)
