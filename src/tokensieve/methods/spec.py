"""Parse method specs: ``name`` or ``name(key=literal, …)``, joined by ``+``."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

from tokensieve.errors import Refusal, nearest
from tokensieve.methods.base import Method
from tokensieve.methods.registry import find

NAME = re.compile(r"\s*([\w./\\:~-]+)")
# what ast raises, beside SyntaxError: no literal, {[]: 1}, and an expression that is nested too deeply
UNREADABLE = (ValueError, TypeError, RecursionError, MemoryError)


def parse(spec: str, **parameters: Any) -> list[Method]:
    """Return the methods of a spec such as ``"visionzip(keep=192) + fastv(layer=8, keep=64)"``.

    Args:
        spec: the text. A name is a registered method or ``path/to/file.py:ClassName``.
        parameters: values for parameters that the spec leaves open, each passed to the methods that have it.

    Raises:
        Refusal: on an unknown method or parameter (it names the nearest), a bad value, or an unreadable spec.
    """
    methods: list[Method] = []
    used: set[str] = set()
    for name, arguments in _split(spec):
        cls = find(name)
        known = [f.name for f in dataclasses.fields(cls)]
        for key in arguments:
            if key not in known:
                raise Refusal(f"{name} has no parameter {key!r}; {nearest(key, known)}")
        extra = {k: v for k, v in parameters.items() if k in known and k not in arguments}
        used |= extra.keys()
        try:
            methods.append(cls(**{**arguments, **extra}))
        except TypeError as error:
            raise Refusal(f"{name}: {error}") from None
    for key in parameters:
        if key not in used:
            names = sorted({f.name for method in methods for f in dataclasses.fields(method)})
            raise Refusal(f"{spec} has no open parameter {key!r}; {nearest(key, names)}")
    return methods


def _split(spec: str) -> list[tuple[str, dict[str, Any]]]:
    """Split a spec into names and literal arguments."""
    parts, remaining = [], spec
    while True:
        match = NAME.match(remaining)
        if match is None:
            raise Refusal(f"cannot read the method spec {spec!r}: a method name is missing at {remaining.strip()!r}")
        name, remaining = match[1], remaining[match.end() :]
        if re.match(r"\+\s*(\(|\+|$)", remaining):  # names that end in a plus sign: prumerge+(keep=64)
            name, remaining = name + "+", remaining[1:]
        arguments: dict[str, Any] = {}
        if remaining.startswith("("):
            arguments, remaining = _read_call(remaining, spec)
        parts.append((name, arguments))
        remaining = remaining.strip()
        if not remaining:
            return parts
        if not remaining.startswith("+"):
            raise Refusal(f"cannot read the method spec {spec!r}: expected '+' at {remaining!r}")
        remaining = remaining[1:]


def _read_call(text: str, spec: str) -> tuple[dict[str, Any], str]:
    """Read ``(key=literal, …)`` at the start of ``text``; return the arguments and the remaining text."""
    for end in (i + 1 for i, c in enumerate(text) if c == ")"):
        try:
            call = ast.parse(f"f{text[:end]}", mode="eval").body
        except SyntaxError:
            continue  # this parenthesis closes a tuple or stands in a string: try the next one
        except UNREADABLE:
            break
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            break
        if len({k.arg for k in call.keywords}) < len(call.keywords):
            break
        try:
            return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}, text[end:]
        except UNREADABLE:
            break
    raise Refusal(
        f"cannot read the method spec {spec!r}: arguments are key=literal pairs in parentheses, each key once"
    )
