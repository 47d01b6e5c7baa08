"""The command line of vLLM's own server, with the plug-in's options and the guard."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from packaging.version import Version

from tokensieve.errors import Refusal
from tokensieve.loading import DEFAULTS, LoadOptions
from tokensieve.serve.settings import Settings
from tokensieve.vllm import orphans

SERVER = "vllm.entrypoints.openai.api_server"
GUARD = "tokensieve.serve.guard.Guard"
FORWARDED = ("dtype", "revision", "trust_remote_code")  # options of loading that vLLM has by the same names


def command(
    model: str,
    options: Mapping[str, Any],
    settings: Settings,
    loading: LoadOptions,
    *,
    host: str,
    port: int,
    grace: float,
    release: str,
    further: Sequence[str] = (),
) -> list[str]:
    """Return the arguments of Python that start vLLM's server.

    Args:
        model: folder or hub name.
        options: result of ``tokensieve.vllm.engine_options``.
        settings: the guard's settings; the served names are ``settings.models``.
        loading: options that vLLM has a flag for.
        host, port: the address.
        grace: seconds for running requests after SIGTERM.
        release: of vLLM.
        further: the user's own arguments for vLLM, last.

    Raises:
        Refusal: a loading option that vLLM has no flag for, or several server processes.
    """
    for name in vars(loading):
        if getattr(loading, name) != getattr(DEFAULTS, name) and name not in FORWARDED:
            raise Refusal(f"--{name.replace('_', '-')} is not passed to vLLM; give vLLM's own option after --")
    if any(argument.startswith("--api-server-count") for argument in further):
        raise Refusal("--api-server-count is refused: limits and metrics are counted in one server process")
    arguments = ["-m", SERVER, "--model", model, "--served-model-name", *settings.models]
    arguments += ["--host", host, "--port", str(port), "--middleware", GUARD, "--shutdown-timeout", str(round(grace))]
    limit = {"image": settings.limits.images}
    arguments += ["--limit-mm-per-prompt", json.dumps(limit)]
    # a request that names no max_tokens would go on to the end of the context
    arguments += ["--override-generation-config", json.dumps({"max_new_tokens": settings.limits.answer_tokens})]
    # vLLM 0.30 lacks the switch and takes a request's choices always; the guard refuses those that are not allowed
    if (settings.methods or settings.allow_keep) and Version(release).release >= (0, 31):
        arguments.append("--trust-request-mm-kwargs")
    arguments += ["--hf-overrides", json.dumps(options["hf_overrides"])]
    for name in FORWARDED:
        value = getattr(loading, name)
        if value != getattr(DEFAULTS, name):
            flag = f"--{name.replace('_', '-')}"
            arguments += [flag] if value is True else [flag, str(value)]
    return [*arguments, *further]


def run(arguments: Sequence[str], settings: Settings) -> NoReturn:
    """Replace this process by vLLM's server: signals then go to it, and its exit code is ours."""
    environment = {**os.environ, **settings.to_environment(), orphans.VARIABLE: "1"}
    os.execve(sys.executable, [sys.executable, *arguments], environment)
