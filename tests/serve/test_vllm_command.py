"""vLLM's command line, and the options that it does not receive."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from tokensieve.cli import app
from tokensieve.commands import serve
from tokensieve.errors import Refusal
from tokensieve.loading import LoadOptions
from tokensieve.serve import Limits, Settings
from tokensieve.serve.vllm_command import GUARD, SERVER, command

OPTIONS = {"hf_overrides": {"architectures": ["Sieved"]}, "enable_mm_embeds": False, "max_model_len": 99}
ADDRESS: dict[str, Any] = {"host": "127.0.0.1", "port": 9000, "grace": 12.4}


def arguments(settings: Settings, loading: LoadOptions | None = None, *further: str, **options: Any) -> list[str]:
    options = OPTIONS | options
    return command("folder/llava", options, settings, loading or LoadOptions(), **ADDRESS, further=further)


def value(line: list[str], flag: str) -> str:
    return line[line.index(flag) + 1]


def test_the_command_line() -> None:
    line = arguments(Settings(("llava",), Limits(images=3)), None, "--enforce-eager")
    assert line[:2] == ["-m", SERVER]
    assert value(line, "--model") == "folder/llava"
    assert value(line, "--served-model-name") == "llava"
    assert (value(line, "--host"), value(line, "--port")) == ("127.0.0.1", "9000")
    assert json.loads(value(line, "--hf-overrides")) == OPTIONS["hf_overrides"]
    assert json.loads(value(line, "--limit-mm-per-prompt")) == {"image": 3}
    assert value(line, "--middleware") == GUARD
    assert value(line, "--shutdown-timeout") == "12"
    assert value(line, "--max-model-len") == "99"
    assert "--no-enable-mm-embeds" in line
    assert "--trust-request-mm-kwargs" not in line
    assert line[-1] == "--enforce-eager"


@pytest.mark.parametrize("choice", [{"allow_keep": True}, {"methods": ("vtc-cls", "divprune")}])
def test_requests_are_trusted_only_when_they_may_choose(choice: dict[str, Any]) -> None:
    assert "--trust-request-mm-kwargs" in arguments(Settings(("llava",), **choice))


def test_the_plug_ins_folder_takes_the_place_of_the_name() -> None:
    line = arguments(Settings(("reference",)), model="written/there")
    assert line.count("--model") == 1
    assert value(line, "--model") == "written/there"


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


def test_the_guard_is_where_vllm_looks_for_it() -> None:
    from importlib import import_module

    module, name = GUARD.rsplit(".", 1)
    assert isinstance(getattr(import_module(module), name), type)


def test_a_wrong_path_is_refused_in_the_words_of_the_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda package: object())  # as if vLLM were installed
    result = CliRunner().invoke(app, ["serve", "path/to/llava"])
    assert (result.exit_code, result.output) == (2, "tokensieve: no model at path/to/llava: it does not exist\n")
