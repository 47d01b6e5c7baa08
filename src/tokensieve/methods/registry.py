"""Find methods by name: the built-in ones, installed plug-ins, and any class in a file."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal, TypeVar, overload

from tokensieve.errors import Refusal, nearest
from tokensieve.methods.base import Method, MethodInfo, Stage
from tokensieve.methods.fusion import FusionMethod
from tokensieve.methods.needs import DecoderNeeds, EncoderNeeds, Needs, StageNeeds
from tokensieve.methods.stages import DecoderMethod, EncoderMethod, PixelMethod, ResizeMethod

ENTRY_POINTS = "tokensieve.methods"
_registry: dict[str, type[Method]] = {}
_NOT_METHODS = {
    "base",
    "fusion",
    "needs",
    "raters",
    "recycling",
    "registers",
    "registry",
    "spec",
    "stages",
    "trained",
    "validate",
}
NEEDS: dict[Stage, type[StageNeeds]] = {
    "encoder": EncoderNeeds,
    "connector": Needs,
    "decoder": DecoderNeeds,
    "fusion": StageNeeds,
}
BASES: dict[Stage, tuple[type[Method], ...]] = {
    "encoder": (EncoderMethod, ResizeMethod, PixelMethod),
    "connector": (Method,),
    "decoder": (DecoderMethod,),
    "fusion": (FusionMethod,),
}
M = TypeVar("M", bound=type[Method])


@overload
def register(
    name: str, *, paper: str, stage: Literal["connector"] = ..., needs: Needs | None = ..., trained: bool = ...
) -> Callable[[M], M]: ...
@overload
def register(
    name: str, *, paper: str, stage: Literal["encoder"], needs: EncoderNeeds | None = ..., trained: bool = ...
) -> Callable[[M], M]: ...
@overload
def register(
    name: str, *, paper: str, stage: Literal["decoder"], needs: DecoderNeeds | None = ..., trained: bool = ...
) -> Callable[[M], M]: ...
@overload
def register(name: str, *, paper: str, stage: Literal["fusion"], trained: bool = ...) -> Callable[[M], M]: ...


def register(
    name: str, *, paper: str, stage: Stage = "connector", needs: StageNeeds | None = None, trained: bool = False
) -> Callable[[M], M]:
    """Give a :class:`Method` dataclass its name and public record (a class decorator).

    Raises:
        Refusal: if another class has the name.
        TypeError: if the class is not a dataclass derived from the base of its stage, or requests the evidence of
            another stage.
    """

    def decorate(cls: M) -> M:
        base = BASES[stage]
        if not (dataclasses.is_dataclass(cls) and issubclass(cls, base)):
            names = " or ".join(b.__name__ for b in base)
            raise TypeError(f"{cls.__name__} must be a dataclass derived from {names} to act at stage {stage!r}")
        if needs is not None and type(needs) is not NEEDS[stage]:
            raise TypeError(
                f"{name} acts at stage {stage!r}, which has the evidence of {NEEDS[stage].__name__}; "
                f"got {type(needs).__name__}"
            )
        if name in _registry and _origin(_registry[name]) != _origin(cls):
            raise Refusal(f"the method name {name!r} is taken by {_origin(_registry[name])}")
        parameters = {f.name: f.default for f in dataclasses.fields(cls)}
        title = (inspect.getdoc(cls) or name).strip().splitlines()[0]
        cls.info = MethodInfo(name, title, paper, stage, needs or NEEDS[stage](), trained, parameters)
        _registry[name] = cls
        return cls

    return decorate


def list_methods() -> list[MethodInfo]:
    """Return the record of every registered method, by name."""
    _load()
    return [cls.info for _, cls in sorted(_registry.items())]


def info(name: str) -> MethodInfo:
    """Return the record of one method; if there is none, the ``Refusal`` names the nearest ones."""
    return find(name).info


def find(name: str) -> type[Method]:
    """Return the class of a method by its name, or by ``path/to/file.py:ClassName``."""
    if ".py:" in name:
        return _from_file(*name.rsplit(":", 1))
    _load()
    if name not in _registry:
        raise Refusal(f"unknown method {name!r}; {nearest(name, list(_registry))}")
    return _registry[name]


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
        except Exception as error:  # a broken plug-in must not take the other methods with it
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(f"the method plug-in {plugin.name!r} ({plugin.value}) is left out: {reason}", stacklevel=1)


def _from_file(file: str, class_name: str) -> type[Method]:
    """Return a method class of a file. An error in the file is raised as it is: its author needs the line."""
    path = Path(os.path.realpath(os.path.expanduser(file)))  # unlike pathlib, for any text: ~unknown, a loop of links
    if not os.path.isfile(path):
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
        except BaseException:  # a half-loaded module must not be found by the next call
            del sys.modules[module_name]
            raise
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        classes = [
            n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, Method) and "info" in vars(c)
        ]
        raise Refusal(f"{file} has no method class {class_name!r}; {nearest(class_name, classes)}")
    if "info" not in vars(cls):  # an inherited record belongs to the base class
        raise Refusal(f"{class_name} in {file} is not registered: decorate it with @tokensieve.register(...)")
    return cls
