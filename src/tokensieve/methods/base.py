"""What every method is: a frozen dataclass with ``reduce``, and a public record of it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args, get_type_hints

from tokensieve.budget import check_budget
from tokensieve.crossmodal import CrossModal, Merge
from tokensieve.reduction import Reduction
from tokensieve.tokens import Layers, VisualTokens

Stage: TypeAlias = Literal["encoder", "connector", "fusion"]
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


@dataclass(frozen=True)
class FusionMethod(Method):
    """Base of methods that act inside a cross-modal encoder, on text and image at once: see :meth:`reduce_pair`."""

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.layers, tuple | list) and all(type(layer) is int for layer in self.layers)
        if not whole or list(self.layers) != sorted(set(self.layers)) or min(self.layers, default=0) < 0:
            raise ValueError(f"layers must be layer numbers from 0, ascending, as in (2, 5, 8); got {self.layers!r}")

    @property
    def acts(self) -> bool:
        """Whether the parameters ask for any reduction at all; if not, nothing is hooked."""
        return True

    @property
    def merges_text(self) -> bool:
        """Whether text tokens may leave; a head that reads every one of them cannot have that."""
        return False

    @property
    def counts_padding(self) -> bool:
        """Whether padding is reduced like tokens; then masks are averaged, and every query sees its own key."""
        return False

    @property
    def follows_sizes(self) -> bool:
        """Whether a token that stands for several counts that much in an average."""
        return False

    @abstractmethod
    def reduce_pair(self, seen: CrossModal) -> tuple[Merge | None, Merge | None]:
        """Decide about the text and the image in one layer, for a batch; ``None`` leaves that stream as it is."""

    def reduce(self, image: VisualTokens) -> Reduction:
        raise ValueError(f"{self.info.name} acts inside cross-modal encoders (ViLT, METER, BridgeTower), not on an LLM")


def _hint(cls: type, name: str) -> Any:
    """Resolved annotation of a field; ``None`` where a plug-in's annotations cannot be resolved."""
    try:
        return get_type_hints(cls).get(name)
    except Exception:  # a plug-in may annotate with names that do not exist at run time: then nothing is checked
        return None
