"""What every method is: a frozen dataclass with ``reduce``, and a public record of it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args, get_type_hints

from tokensieve.budget import check_budget
from tokensieve.reduction import Reduction
from tokensieve.tokens import Layers, VisualTokens

Stage: TypeAlias = Literal["encoder", "connector"]
Positions: TypeAlias = Literal["original", "contiguous"]


@dataclass(frozen=True)
class Needs:
    """What a method asks to be given; nothing else is computed.

    Attributes:
        cls_attention: encoder layers whose [CLS] row is wanted (an int or a slice, negative counts from the last).
        text: the embeddings of the user's words.
        grid: the tokens must form a grid.
    """

    cls_attention: Layers | None = None
    text: bool = False
    grid: bool = False

    def __str__(self) -> str:
        wants = []
        if self.cls_attention is not None:
            wants.append("[CLS] attention")
        return ", ".join([*wants, *(name for name in ("text", "grid") if getattr(self, name))]) or "nothing"


@dataclass(frozen=True)
class MethodInfo:
    """The public record of a registered method; ``parameters`` maps each field to its default."""

    name: str
    title: str
    paper: str
    stage: Stage
    needs: Needs
    trained: bool
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. Subclasses add their parameters as fields and implement :meth:`reduce`.

    Fields named ``keep`` are budgets and are validated on creation; a ``Literal`` field accepts its values only.
    """

    info: ClassVar[MethodInfo]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), get_args(_hint(type(self), field.name))
            if field.name == "keep":
                check_budget(value)
            elif allowed and all(isinstance(a, str) for a in allowed) and value not in allowed:
                raise ValueError(f"{field.name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")

    @property
    def needs(self) -> Needs:
        """What this instance needs; override where it depends on the parameters."""
        return self.info.needs

    @abstractmethod
    def reduce(self, image: VisualTokens) -> Reduction:
        """Decide for B equal images at once."""

    def __call__(self, image: VisualTokens) -> Reduction:
        """:meth:`reduce`, unless the budget keeps the image whole: then the identity, with a note saying so."""
        keep = getattr(self, "keep", None)
        if keep is not None and image.count(keep) == image.total:
            b, n, _ = image.features.shape
            note = f"kept whole: keep={keep} does not ask for fewer than its {n} tokens"
            return Reduction.identity(n, b, image.features.device, grid=image.grid, notes=(note,))
        return self.reduce(image)

    def __str__(self) -> str:
        """The spec that :func:`~tokensieve.parse` reads back: non-default parameters, and the budget always."""
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.name == "keep" or getattr(self, f.name) != f.default
        ]
        return self.info.name + (f"({', '.join(shown)})" if shown else "")


def _hint(cls: type, name: str) -> Any:
    """Resolved annotation of a field; ``None`` where a plug-in's annotations cannot be resolved."""
    try:
        return get_type_hints(cls).get(name)
    except Exception:  # a plug-in may annotate with names that do not exist at run time: then nothing is checked
        return None
