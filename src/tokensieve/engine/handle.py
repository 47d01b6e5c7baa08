"""The handle of an attached method, and the register of attached models."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

from tokensieve.engine.handoff import Decisions
from tokensieve.errors import Refusal
from tokensieve.methods import Method

_attached: weakref.WeakValueDictionary[int, Sieve] = weakref.WeakValueDictionary()  # by id; the hooks keep it alive
_lock = threading.Lock()
AnySieve = TypeVar("AnySieve", bound="Sieve")


class Sieve(ABC):
    """An attached method. Use it as a context manager, or call :meth:`detach`.

    Attributes:
        model: the model that the method is attached to.
        methods: one method per stage, in order; none for a replay.
        tokens: `[sample][image]`, the number of its tokens that each layer received in the latest prefill. Caches hold
            as many, except those of a method with ``leaves_caches``: all of them hold those of the last layer.
        nets: the net of each trained method, by its stage; the model does not know them.
    """

    def __init__(self, model: Any, methods: Sequence[Method]) -> None:
        self.model, self.methods = model, list(methods)
        self.tokens: list[list[list[int]]] = []
        self.nets: dict[str, nn.Module] = {}
        self._decisions: Decisions | None = None  # None: not composed since the latest prefill

    @property
    def last(self) -> Decisions:
        """`[sample][image]`, the Reduction of each image or video in the latest prefill, all stages as one."""
        if self._decisions is None:  # composed when it is read, not in the prefill
            self._decisions = self._compose()
        return self._decisions

    @abstractmethod
    def _compose(self) -> Decisions: ...

    @abstractmethod
    def _remove(self) -> None: ...

    def detach(self) -> None:
        """Remove every hook: the model is bit-identical to before. A second call does nothing."""
        with _lock:
            if _attached.get(id(self.model)) is not self:
                return
            del _attached[id(self.model)]
        self._remove()

    def __enter__(self: AnySieve) -> AnySieve:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __str__(self) -> str:
        return " + ".join(map(str, self.methods)) or "a replay"

    def __repr__(self) -> str:
        state = "attached" if _attached.get(id(self.model)) is self else "detached"
        return f"<Sieve {self} on {type(self.model).__name__}, {state}>"

    def __reduce__(self) -> Any:
        """Refuse to copy or pickle an attached model, because hooks belong to one model."""
        raise Refusal(f"{self} is attached to this model; detach() it first: hooks cannot be copied")


def install(model: Any, make: Callable[[], AnySieve]) -> AnySieve:
    """Make the handle of a model, and register it.

    Raises:
        Refusal: if the model has a method attached already.
    """
    with _lock:
        if id(model) in _attached:
            raise Refusal(f"{_attached[id(model)]} is attached to this model already; detach() it first")
        handle = make()
        _attached[id(model)] = handle
    return handle
