"""Spec files: a method, its budget and the options of ``attach`` in one JSON file, with the evidence for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from tokensieve.budget import Budget, BudgetScope, check_budget
from tokensieve.errors import Refusal
from tokensieve.methods.base import Positions, Repair

VERSION = 1
DEFAULTS: dict[str, Any] = {
    "positions": "original",
    "separators": "kept-lines",
    "budget_scope": "image",
    "repair": None,
    "reselect": False,
}
"""Options of ``attach`` that a file holds; one that is missing has its default."""
ALLOWED = {
    "positions": get_args(Positions),
    "separators": ("kept-lines", "none"),
    "budget_scope": get_args(BudgetScope),
    "repair": (None, *get_args(Repair)),
    "reselect": (False, True),
}
KEYS = ("tokensieve_spec", "method", "keep", *DEFAULTS, "evidence")


@dataclass(frozen=True)
class SpecFile:
    """The contents of a spec file.

    Attributes:
        method: a spec; ``keep`` is the budget of the stages that leave theirs open, if there are any.
        options: positions, separators, budget_scope, repair and reselect, as for ``attach``.
        evidence: the measurements that led to this choice, for the reader.
        name: the file's name, for errors.
    """

    method: str
    keep: Budget | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: DEFAULTS)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    name: str = "the spec file"

    @property
    def parameters(self) -> dict[str, Any]:
        """The values for open parameters of ``method``."""
        return {} if self.keep is None else {"keep": self.keep}

    def merged(self, **given: Any) -> dict[str, Any]:
        """Return the file's options. A given one that is not the default of ``attach`` must agree.

        Raises:
            Refusal: naming the option with both values.
        """
        for name, value in given.items():
            if value not in (DEFAULTS[name], self.options[name]):
                conflict = f"{self.name} says {name}={self.options[name]!r}; got {name}={value!r}"
                raise Refusal(f"{conflict}: leave it out, or edit the file")
        return dict(self.options)

    def to_json(self) -> dict[str, Any]:
        """Return the file's contents."""
        return {"tokensieve_spec": VERSION, "method": self.method, "keep": self.keep, **self.options} | {
            "evidence": dict(self.evidence)
        }


def is_spec_file(spec: str) -> bool:
    """Return whether a spec is the path of a spec file: it ends in ``.json``."""
    return spec.strip().endswith(".json")


def read_spec_file(path: str | Path) -> SpecFile:
    """Read a spec file. The method itself is checked where it is parsed.

    Raises:
        Refusal: no such file, no JSON, another version, an unknown key, or a value that is not allowed.
    """
    file = Path(str(path).strip())
    try:
        data = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise Refusal(f"there is no spec file {file}; `tokensieve tune` writes one") from None
    except OSError as error:
        raise Refusal(f"cannot read the spec file {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{file} is not JSON: {error}") from None
    if not isinstance(data, dict) or "tokensieve_spec" not in data:
        raise Refusal(f"{file} is not a spec file of `tokensieve tune`: it has no key 'tokensieve_spec'")
    if data["tokensieve_spec"] != VERSION:
        raise Refusal(f"{file} has version {data['tokensieve_spec']!r}; this Tokensieve reads version {VERSION}")
    if unknown := sorted(data.keys() - set(KEYS)):
        raise Refusal(f"{file}: unknown key {unknown[0]!r}; known: {', '.join(KEYS)}")
    method, keep, evidence = data.get("method"), data.get("keep"), data.get("evidence", {})
    if not isinstance(method, str) or is_spec_file(method):
        raise Refusal(f"{file}: method must be a spec such as 'vtc-cls'; got {method!r}")
    if not isinstance(evidence, dict):
        raise Refusal(f"{file}: evidence must be an object; got {evidence!r}")
    if keep is not None:
        try:
            check_budget(keep)
        except Refusal as error:
            raise Refusal(f"{file}: {error}") from None
    options = {name: data.get(name, default) for name, default in DEFAULTS.items()}
    for name, value in options.items():
        if value not in ALLOWED[name]:
            raise Refusal(f"{file}: {name} must be one of {', '.join(map(repr, ALLOWED[name]))}; got {value!r}")
    return SpecFile(method, keep, options, evidence, file.name)
