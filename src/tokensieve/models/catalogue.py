"""Which families there are, and which one a live model belongs to."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

import tokensieve.models
from tokensieve.errors import Refusal
from tokensieve.models.family import Family
from tokensieve.models.generic import REFUSED, Generic, discoverable

TESTED = "5.23"
"""The transformers release that the families are tested with."""


@cache
def families() -> tuple[Family, ...]:
    """All families that Tokensieve knows: one per file of this folder that declares ``model_types``, by name."""
    found: dict[str, Family] = {}
    for file in pkgutil.iter_modules(tokensieve.models.__path__):
        module = importlib.import_module(f"tokensieve.models.{file.name}")
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, Family) and "model_types" in vars(cls):
                found[cls.name] = cls()
    return tuple(found[name] for name in sorted(found))


def family_of(model: Any) -> Family:
    """The family of a live model; of an unknown one of the same shape, what can be discovered.

    Raises:
        ValueError: if the model is of no known family and of another shape; names the families, or the reason.
    """
    config = getattr(model, "config", None)
    for family in families():
        if family.describes(config):
            return family
    model_type = getattr(config, "model_type", None)
    if model_type in REFUSED:
        raise Refusal(f"{type(model).__name__} is not supported: {REFUSED[model_type]}")
    if discoverable(model):
        return Generic(model)
    known = ", ".join(sorted({t for family in families() for t in family.model_types}))
    raise Refusal(f"{type(model).__name__} (model type {model_type!r}) is of no supported family; supported: {known}")
