"""The command line of vLLM's own server, with the plug-in's options and the guard."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

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
    further: Sequence[str] = (),
) -> list[str]:
    """Return the arguments of Python that start vLLM's server.

    Args:
        model: the user's name of the model.
        options: result of ``tokensieve.vllm.engine_options``; a "model" in it takes the place of ``model``.
        settings: the guard's settings; the served names are ``settings.models``.
        loading: options that vLLM has a flag for.
        host, port: the address.
        grace: seconds for running requests after SIGTERM.
        further: the user's own arguments for vLLM, last.

    Raises:
        Refusal: a loading option that vLLM has no flag for, or several server processes.
    """
    for name in vars(loading):
        if getattr(loading, name) != getattr(DEFAULTS, name) and name not in FORWARDED:
            raise Refusal(f"--{name.replace('_', '-')} is not passed to vLLM; give vLLM's own option after --")
    if any(argument.startswith("--api-server-count") for argument in further):
        raise Refusal("--api-server-count is refused: limits and metrics are counted in one server process")
    options = dict(options)
    arguments = ["-m", SERVER, "--model", str(options.pop("model", model)), "--served-model-name", *settings.models]
    arguments += ["--host", host, "--port", str(port), "--middleware", GUARD, "--shutdown-timeout", str(round(grace))]
    limit = {"image": settings.limits.images}
    arguments += ["--limit-mm-per-prompt", json.dumps(limit)]
    # a request that names no max_tokens would go on to the end of the context
    arguments += ["--override-generation-config", json.dumps({"max_new_tokens": settings.limits.answer_tokens})]
    if settings.methods or settings.allow_keep:
        arguments.append("--trust-request-mm-kwargs")
    for name in FORWARDED:
        if getattr(loading, name) != getattr(DEFAULTS, name):
            options.setdefault(name, getattr(loading, name))
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        else:
            arguments += [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return [*arguments, *further]


def run(arguments: Sequence[str], settings: Settings) -> NoReturn:
    """Replace this process by vLLM's server: signals then go to it, and its exit code is ours."""
    environment = {**os.environ, **settings.to_environment(), orphans.VARIABLE: "1"}
    os.execve(sys.executable, [sys.executable, *arguments], environment)
