"""The method spec grammar: ``name`` or ``name(key=literal, …)``, joined by ``+``."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

from tokensieve.errors import Refusal
from tokensieve.methods.base import Method
from tokensieve.methods.registry import find, nearest

NAME = re.compile(r"\s*([\w./\\:~-]+)")


def parse(spec: str, **parameters: Any) -> list[Method]:
    """Read a spec such as ``"visionzip(keep=192) + fastv(layer=8, keep=64)"``.

    Args:
        spec: the text. A name is a registered method or ``path/to/file.py:ClassName``.
        parameters: values for parameters that the spec leaves open, each given to the stages that have it.

    Raises:
        ValueError: unknown method or parameter (naming the nearest), bad value, or a spec that cannot be read.
    """
    stages: list[Method] = []
    used: set[str] = set()
    for name, given in _stages(spec):
        cls = find(name)
        known = [f.name for f in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise Refusal(f"{name} has no parameter {key!r}; {nearest(key, known)}")
        extra = {k: v for k, v in parameters.items() if k in known and k not in given}
        used |= extra.keys()
        try:
            stages.append(cls(**{**given, **extra}))
        except TypeError as error:
            raise Refusal(f"{name}: {error}") from None
    for key in parameters:
        if key not in used:
            names = sorted({f.name for stage in stages for f in dataclasses.fields(stage)})
            raise Refusal(f"{spec} has no open parameter {key!r}; {nearest(key, names)}")
    return stages


def _stages(spec: str) -> list[tuple[str, dict[str, Any]]]:
    """Split a spec into names and literal arguments."""
    out, rest = [], spec
    while True:
        match = NAME.match(rest)
        if match is None:
            raise Refusal(f"cannot read the method spec {spec!r}: a method name is missing at {rest.strip()!r}")
        name, rest = match[1], rest[match.end() :]
        if re.match(r"\+\s*(\(|\+|$)", rest):  # names that end in a plus sign: prumerge+(keep=64)
            name, rest = name + "+", rest[1:]
        arguments: dict[str, Any] = {}
        if rest.startswith("("):
            call, rest = _call(rest, spec)
            arguments = call
        out.append((name, arguments))
        rest = rest.strip()
        if not rest:
            return out
        if not rest.startswith("+"):
            raise Refusal(f"cannot read the method spec {spec!r}: expected '+' at {rest!r}")
        rest = rest[1:]


def _call(rest: str, spec: str) -> tuple[dict[str, Any], str]:
    """Read ``(key=literal, …)`` at the start of ``rest``; returns the arguments and what follows."""
    for end in (i + 1 for i, c in enumerate(rest) if c == ")"):
        try:
            call = ast.parse(f"f{rest[:end]}", mode="eval").body
        except SyntaxError:
            continue  # this parenthesis closes a tuple or stands in a string: try the next one
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            break
        if len({k.arg for k in call.keywords}) < len(call.keywords):
            break
        try:
            return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}, rest[end:]
        except ValueError:
            break
    raise Refusal(
        f"cannot read the method spec {spec!r}: arguments are key=literal pairs in parentheses, each key once"
    )
