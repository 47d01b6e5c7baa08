"""Parse method specs: ``name`` or ``name(key=literal, …)``, joined by ``+``; or the path of a spec file."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from tokensieve.errors import Refusal, nearest
from tokensieve.methods.base import Method
from tokensieve.methods.registry import find
from tokensieve.methods.spec_file import DEFAULTS, is_spec_file, read_spec_file

NAME = re.compile(r"\s*([\w./\\:~-]+)")
# what ast raises, beside SyntaxError: no literal, {[]: 1}, and an expression that is nested too deeply
UNREADABLE = (ValueError, TypeError, RecursionError, MemoryError)


def parse(spec: str, **parameters: Any) -> list[Method]:
    """Return the methods of a spec such as ``"visionzip(keep=192) + fastv(layer=8, keep=64)"``.

    Args:
        spec: the text. A name is a registered method or ``path/to/file.py:ClassName``. A text that ends in ``.json`` is
            the path of a spec file; its options are those of ``attach``, which reads them (see :func:`expand`).
        parameters: values for parameters that the spec leaves open, each passed to the methods that have it.

    Raises:
        Refusal: on an unknown method or parameter (it names the nearest), a bad value, or an unreadable spec.
    """
    if is_spec_file(spec):
        if parameters:
            raise Refusal(f"{spec} gives all parameters; got {', '.join(parameters)}: leave it out, or edit the file")
        file = read_spec_file(spec)
        return parse(file.method, **file.parameters)
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
            reason = "the spec gives it: leave one of the two out" if key in names else nearest(key, names)
            raise Refusal(f"{spec} has no open parameter {key!r}; {reason}")
    return methods


def expand(specs: Sequence[str], **options: Any) -> tuple[list[str], dict[str, Any]]:
    """Replace paths of spec files by the specs inside, each with its budget; return the specs and the options.

    Args:
        options: the given positions, separators, budget_scope and repair, as far as the caller can set them. Those of
            the files take their place, and hold for all specs.

    Raises:
        Refusal: a file cannot be read, files disagree, or an option differs from the file's, or cannot be set here.
    """
    files = [read_spec_file(spec) for spec in specs if is_spec_file(spec)]
    for file in files:
        if file.options != files[0].options:
            raise Refusal(f"{files[0].name} and {file.name} differ in their options: use one of them at a time")
    if files:
        merged = files[0].merged(**options)
        for name in merged.keys() - options.keys():
            if merged[name] != DEFAULTS[name]:
                raise Refusal(f"{files[0].name} says {name}={merged[name]!r}, which cannot be set here")
        options = {name: merged[name] for name in options}
    return [" + ".join(map(str, parse(spec))) if is_spec_file(spec) else spec for spec in specs], options


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
