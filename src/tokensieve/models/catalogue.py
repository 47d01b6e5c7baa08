"""Find the model families, and the family of a live model."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

import tokensieve.models
from tokensieve.errors import Refusal
from tokensieve.models.family import Family
from tokensieve.models.generic import REFUSED, Generic, discoverable
from tokensieve.models.versions import check_release


@cache
def families() -> tuple[Family, ...]:
    """Return all families, sorted by name: each file of this folder that declares ``model_types`` is one."""
    by_name: dict[str, Family] = {}
    for file in pkgutil.iter_modules(tokensieve.models.__path__):
        module = importlib.import_module(f"tokensieve.models.{file.name}")
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, Family) and "model_types" in vars(cls):
                by_name[cls.name] = cls()
    return tuple(by_name[name] for name in sorted(by_name))


def family_of(model: Any) -> Family:
    """Return the family of a live model, or :class:`Generic` for an unregistered model that can be discovered.

    Raises:
        Refusal: if the model is of no known family and cannot be discovered, or the installed transformers is too old
            for it; names the reason or the families.
    """
    config = getattr(model, "config", None)
    check_release(getattr(config, "model_type", None))
    rate = getattr(config, "video_pruning_rate", None)  # as in Nemotron's EVS
    if rate:
        raise Refusal(
            f"{type(model).__name__} drops visual tokens by itself (video_pruning_rate is {rate}): set it to 0 in the "
            "model's config, or attach nothing"
        )
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
