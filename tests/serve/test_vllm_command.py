"""vLLM's command line, and the options that it does not receive."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from typer.testing import CliRunner

from tokensieve.cli import app
from tokensieve.commands import serve
from tokensieve.errors import Refusal
from tokensieve.loading import LoadOptions
from tokensieve.serve import Limits, Settings
from tokensieve.serve.vllm_command import GUARD, SERVER, command
from tokensieve.vllm import checkpoint, orphans, placeholders

OPTIONS = {"hf_overrides": {"architectures": ["Sieved"]}}
ADDRESS: dict[str, Any] = {"host": "127.0.0.1", "port": 9000, "grace": 12.4, "release": "0.32.0+cpu"}


def arguments(settings: Settings, loading: LoadOptions | None = None, *further: str) -> list[str]:
    return command("folder/llava", OPTIONS, settings, loading or LoadOptions(), **ADDRESS, further=further)


def value(line: list[str], flag: str) -> str:
    return line[line.index(flag) + 1]


def test_the_command_line() -> None:
    line = arguments(Settings(("llava",), Limits(images=3, answer_tokens=77)), None, "--enforce-eager")
    assert line[:2] == ["-m", SERVER]
    assert value(line, "--model") == "folder/llava"
    assert value(line, "--served-model-name") == "llava"
    assert (value(line, "--host"), value(line, "--port")) == ("127.0.0.1", "9000")
    assert json.loads(value(line, "--hf-overrides")) == OPTIONS["hf_overrides"]
    assert json.loads(value(line, "--limit-mm-per-prompt")) == {"image": 3}
    assert json.loads(value(line, "--override-generation-config")) == {"max_new_tokens": 77}
    assert value(line, "--middleware") == GUARD
    assert value(line, "--shutdown-timeout") == "12"
    assert "--trust-request-mm-kwargs" not in line
    assert line[-1] == "--enforce-eager"


@pytest.mark.parametrize("choice", [{"allow_keep": True}, {"methods": ("vtc-cls", "divprune")}])
def test_requests_are_trusted_only_when_they_may_choose(choice: dict[str, Any]) -> None:
    settings = Settings(("llava",), **choice)
    assert "--trust-request-mm-kwargs" in arguments(settings)
    before = command("folder/llava", OPTIONS, settings, LoadOptions(), **ADDRESS | {"release": "0.30.2"})
    assert "--trust-request-mm-kwargs" not in before  # that release ends at a switch that it does not know


def test_loading_options_that_vllm_has_are_passed_on() -> None:
    line = arguments(Settings(("m",)), LoadOptions(dtype="bfloat16", revision="v2", trust_remote_code=True))
    assert value(line, "--dtype") == "bfloat16"
    assert value(line, "--revision") == "v2"
    assert "--trust-remote-code" in line


def test_others_are_refused() -> None:
    for loading, flag in ((LoadOptions(device="cpu"), "--device"), (LoadOptions(chat={"a": 1}), "--chat")):
        with pytest.raises(Refusal, match=f"{flag} is not passed to vLLM"):
            arguments(Settings(("m",)), loading)
    with pytest.raises(Refusal, match="one server process"):
        arguments(Settings(("m",)), None, "--api-server-count=2")


START_CHILD = """
import multiprocessing, time

def child():
    from tokensieve.vllm.orphans import end_with_parent
    end_with_parent()
    print("started", flush=True)
    time.sleep(120)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    print(process.pid, flush=True)
    process.join()
"""


@pytest.mark.parametrize("variable", ["1", ""])
def test_a_process_of_the_engine_ends_with_a_server_that_is_killed(tmp_path, variable: str) -> None:
    (tmp_path / "start.py").write_text(START_CHILD)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "start.py")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, orphans.VARIABLE: variable},
    )
    assert parent.stdout is not None
    number = int(parent.stdout.readline())
    try:
        assert parent.stdout.readline() == "started\n"
        parent.kill()
        parent.wait()
        # the child holds the other end of this pipe until it ends
        ended, _, _ = select.select([parent.stdout], [], [], 20 if variable else 1)
        assert bool(ended) == bool(variable)
    finally:
        parent.stdout.close()
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def test_the_guard_is_where_vllm_looks_for_it() -> None:
    from importlib import import_module

    module, name = GUARD.rsplit(".", 1)
    assert isinstance(getattr(import_module(module), name), type)


def test_the_tokens_that_stand_for_an_image_are_read_from_the_checkpoint() -> None:
    assert placeholders(checkpoint("reference")) == ("<image>",)


def test_the_settings_reach_vllm_as_they_are(monkeypatch) -> None:
    settings = Settings(("m",), Limits(images=3), methods=("vtc-cls",), paths=("/x",), placeholders=("<image>",))
    for name, text in settings.to_environment().items():
        monkeypatch.setenv(name, text)
    assert Settings.from_environment() == settings


def test_a_wrong_path_is_refused_in_the_words_of_the_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda package: object())  # as if vLLM were installed
    result = CliRunner().invoke(app, ["serve", "path/to/llava"])
    assert (result.exit_code, result.output) == (2, "tokensieve: no model at path/to/llava: it does not exist\n")


def test_a_busy_port_is_refused_before_vllm_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda package: object())  # as if vLLM were installed
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "reference", "--port", str(port)])
    assert result.exit_code == 2
    assert result.output.startswith(f"tokensieve: cannot listen on 127.0.0.1:{port}: ")
