"""Check the parameters of a method against the annotations of its fields."""

from __future__ import annotations

from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", NoneType: "None"}


def hint_of(cls: type, name: str) -> Any:
    """Return the resolved annotation of a field; ``None`` where a plug-in's annotations cannot be resolved."""
    try:
        return get_type_hints(cls).get(name)
    except Exception:  # a plug-in may annotate with names that do not exist at run time: then nothing is checked
        return None


def fits(value: Any, hint: Any) -> bool:
    """Return whether an annotation allows a value; True for annotations that are not checked."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        return len(inner) != 2 or inner[1] is not Ellipsis or all(fits(item, inner[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, NoneType) else True


def plain(value: Any) -> Any:
    """Return a number of another library, such as NumPy's, as Python's, also inside a tuple; others as they are."""
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def describe(hint: Any) -> str:
    """Return an annotation in the words of an error message."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        parts = [part for part in inner if not (part is int and float in inner)]  # every whole number is a number
        return " or ".join(map(describe, parts))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin is tuple and inner:
        return f"a tuple, each item {describe(inner[0])}"
    return NAMES.get(hint, str(hint))
