"""Names to methods: the built-in ones, installed plug-ins, and any class in a file."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from tokensieve.errors import Refusal
from tokensieve.methods.base import Method, MethodInfo, Needs, Stage

ENTRY_POINTS = "tokensieve.methods"
_registry: dict[str, type[Method]] = {}
_NOT_METHODS = {"base", "fusion", "raters", "registry", "spec"}
M = TypeVar("M", bound=type[Method])


def register(
    name: str, *, paper: str, stage: Stage = "connector", needs: Needs | None = None, trained: bool = False
) -> Callable[[M], M]:
    """Class decorator: give a :class:`Method` dataclass its name and public record.

    Raises:
        ValueError: if another class has the name.
        TypeError: if the class is not a dataclass derived from Method.
    """

    def decorate(cls: M) -> M:
        if not (dataclasses.is_dataclass(cls) and issubclass(cls, Method)):
            raise TypeError(f"{cls.__name__} must be a dataclass derived from tokensieve.Method")
        if name in _registry and _origin(_registry[name]) != _origin(cls):
            raise Refusal(f"the method name {name!r} is taken by {_origin(_registry[name])}")
        parameters = {f.name: f.default for f in dataclasses.fields(cls)}
        title = (inspect.getdoc(cls) or name).strip().splitlines()[0]
        cls.info = MethodInfo(name, title, paper, stage, needs or Needs(), trained, parameters)
        _registry[name] = cls
        return cls

    return decorate


def list_methods() -> list[MethodInfo]:
    """Every registered method, by name."""
    _load()
    return [cls.info for _, cls in sorted(_registry.items())]


def info(name: str) -> MethodInfo:
    """The record of one method; ``ValueError`` naming the nearest names if there is none."""
    return find(name).info


def find(name: str) -> type[Method]:
    """The class behind a name, or behind ``path/to/file.py:ClassName``."""
    if ".py:" in name:
        return _from_file(*name.rsplit(":", 1))
    _load()
    if name not in _registry:
        raise Refusal(f"unknown method {name!r}; {nearest(name, list(_registry))}")
    return _registry[name]


def nearest(name: str, known: list[str]) -> str:
    """'did you mean a, b?' or, when nothing is near, the whole list."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(sorted(known)) or 'none'}"


def _origin(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@lru_cache(maxsize=1)
def _load() -> None:
    package = importlib.import_module("tokensieve.methods")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in _NOT_METHODS:
            importlib.import_module(f"tokensieve.methods.{module.name}")
    for plugin in entry_points(group=ENTRY_POINTS):
        try:
            plugin.load()
        except Exception as error:  # whatever a plug-in does wrong, the other methods work
            why = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(f"the method plug-in {plugin.name!r} ({plugin.value}) is left out: {why}", stacklevel=1)


def _from_file(file: str, class_name: str) -> type[Method]:
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise Refusal(f"no such method file: {file}")
    module_name = f"tokensieve_plugin_{path.stem}_{abs(hash(str(path))):x}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise Refusal(f"{file} does not load: {type(error).__name__}: {error}") from error
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        found = [
            n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, Method) and c is not Method
        ]
        raise Refusal(f"{file} has no method class {class_name!r}; {nearest(class_name, found)}")
    if "info" not in vars(cls):  # its own, not that of a method it derives from
        raise Refusal(f"{class_name} in {file} is not registered: decorate it with @tokensieve.register(...)")
    return cls
