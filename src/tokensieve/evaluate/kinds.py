"""The kind of a row, from its method spec: full, blind, oracle, a baseline or a method."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, TypeAlias

from tokensieve.evaluate.plan import is_random_baseline
from tokensieve.evaluate.rows import BLIND, FULL, ORACLE
from tokensieve.methods import MethodInfo, list_methods

Kind: TypeAlias = Literal["full", "blind", "oracle", "random", "baseline", "method"]
NO_METHOD: dict[str, Kind] = {FULL: "full", BLIND: "blind", ORACLE: "oracle"}
REDUCING = ("method", "baseline", "random")  # kinds of rows that drop tokens without knowing the answer
BASELINES = ("baseline", "random")


def baseline_methods() -> dict[str, MethodInfo]:
    """Return {name: info} of the registered baselines without the unhooked model, sorted by name."""
    return {info.name: info for info in list_methods() if info.paper == "baseline" and info.name != FULL}


def plain_name(spec: str) -> str:
    """Return the method of a spec without its arguments."""
    return spec.partition("(")[0].strip()


def kind_of(spec: str, baselines: Mapping[str, MethodInfo]) -> Kind:
    """Return the kind of a row from its method spec; a baseline composed with a method is a method."""
    name = plain_name(spec)
    if name in baselines and re.fullmatch(r"[\w+-]+\s*(\([^()]*\))?\s*", spec):
        return "random" if is_random_baseline(baselines[name]) else "baseline"
    return NO_METHOD.get(name, "method")
