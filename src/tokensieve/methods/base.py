"""What every method is: a frozen dataclass with ``reduce``, and a public record of it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from tokensieve.budget import Budget, check_budget, count, stage_counts
from tokensieve.errors import Refusal
from tokensieve.reduction import Reduction
from tokensieve.tokens import Layers, VisualTokens

Stage: TypeAlias = Literal["encoder", "connector", "decoder", "fusion"]
Positions: TypeAlias = Literal["original", "contiguous"]


@dataclass(frozen=True)
class Needs:
    """What a method asks to be given; nothing else is computed.

    Attributes:
        cls_attention: encoder layers whose [CLS] row is wanted: one, several or a slice; negative ones from the last.
        cls_wide: encoder layers whose [CLS] row is wanted with the heads side by side as a single one.
        received: encoder layers of which the attention that each token receives is wanted.
        encoder_keys: encoder layers whose keys are wanted.
        patches: the encoder's rows before the projector.
        joint: tokens and prompt in a space shared by image and text encoder.
        text: the embeddings of the user's words.
        grid: the tokens must form a grid.
        queries: in the LLM, attention rows of the last prompt token ("last") or of every word of the user ("words").
        own: these rows are those of the stage's own block, asked ahead; else of the block before, which has run.
        keys: in the LLM, key states of visual tokens and words in the block before.
        entry: in the LLM, the embeddings of visual tokens and words as they entered it.
        normed: in the LLM, features and text after the LLM's final norm.
        residual: in the LLM, what entered the block before, and what its MLP was given.
        rotary: in the LLM, the rotary embedding at the places of visual tokens and words.
        ranked: in the LLM, what the connector method ranked the tokens by.
        cls_similarity: how much each patch resembles the encoder's [CLS] token in what the encoder puts out.
        video: the tokens must be those of a video's frames; images stay whole.
    """

    cls_attention: Layers | None = None
    cls_wide: Layers | None = None
    received: Layers | None = None
    encoder_keys: Layers | None = None
    patches: bool = False
    joint: bool = False
    text: bool = False
    grid: bool = False
    queries: Literal["last", "words"] | None = None
    own: bool = False
    keys: bool = False
    entry: bool = False
    normed: bool = False
    residual: bool = False
    rotary: bool = False
    ranked: bool = False
    cls_similarity: bool = False
    video: bool = False

    @property
    def reads_encoder(self) -> bool:
        """Whether anything is wanted that is read inside the vision tower."""
        return self.patches or self.cls_similarity or self.reads_attention

    @property
    def reads_attention(self) -> bool:
        """Whether attention of the vision tower is wanted, or its keys."""
        layers = (self.cls_attention, self.cls_wide, self.received, self.encoder_keys)
        return any(layer is not None for layer in layers)

    def __str__(self) -> str:
        wants = []
        if self.cls_attention is not None or self.cls_wide is not None:
            wants.append("[CLS] attention")
        if self.cls_similarity:
            wants.append("[CLS] similarity")
        if self.received is not None:
            wants.append("attention received")
        if self.encoder_keys is not None:
            wants.append("encoder keys")
        if self.queries is not None:
            wants.append(f"LLM attention of {self.queries}")
        shown = ("patches", "joint", "text", "grid", "video")
        return ", ".join([*wants, *(name for name in shown if getattr(self, name))]) or "nothing"


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

    Fields named ``keep`` are budgets and are validated on creation (one that may be ``None`` is of an adaptive method);
    a ``Literal`` field accepts its values only, and one of numbers, text, ``bool`` or a tuple what its annotation says.
    """

    info: ClassVar[MethodInfo]
    least: ClassVar[Mapping[str, int]] = {}  # the smallest value of parameters that have one
    proportions: ClassVar[tuple[str, ...]] = ()  # parameters that lie in [0, 1]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), _hint(type(self), field.name)
            allowed = get_args(hint)
            if field.name in ("keep", "average") and not (value is None and type(None) in allowed):
                check_budget(value)
            elif allowed and all(isinstance(a, str) for a in allowed) and value not in allowed:
                raise Refusal(f"{field.name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
            elif not _fits(value, hint):
                raise Refusal(f"{field.name} must be {_in_words(hint)}; got {value!r}")
            elif field.name in self.least and value < self.least[field.name]:
                raise Refusal(f"{field.name} must be at least {self.least[field.name]}; got {value}")
            elif field.name in self.proportions and not 0 <= value <= 1:
                raise Refusal(f"{field.name} must be a share in [0, 1]; got {value!r}")

    @property
    def needs(self) -> Needs:
        """What this instance needs; override where it depends on the parameters."""
        return self.info.needs

    @property
    def by_score(self) -> bool:
        """Whether what stays are the tokens with the largest of the Reduction's scores, which compare across images."""
        return False

    @abstractmethod
    def reduce(self, image: VisualTokens) -> Reduction:
        """Decide for B equal images at once."""

    def count(self, image: VisualTokens) -> int | None:
        """Tokens that the budget leaves of each image; ``None`` for a method without one."""
        keep: Budget | None = getattr(self, "keep", None)
        return None if keep is None else image.count(keep)

    def __call__(self, image: VisualTokens) -> Reduction:
        """:meth:`reduce`, unless the image is kept whole: then the identity, with a note saying why."""
        b, n, _ = image.features.shape
        if self.needs.video and image.frames is None:
            note = f"kept whole: {self.info.name} reduces videos, and this is an image"
        elif self.count(image) == n:
            note = f"kept whole: the budget of {self} does not ask for fewer than its {n} tokens"
        else:
            return self.reduce(image)
        return Reduction.identity(n, b, image.features.device, grid=image.grid, notes=(note,))

    def __str__(self) -> str:
        """The spec that :func:`~tokensieve.parse` reads back: non-default parameters, and the budget always."""
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.name == "keep" or getattr(self, f.name) != f.default
        ]
        return self.info.name + (f"({', '.join(shown)})" if shown else "")


@dataclass(frozen=True)
class DecoderMethod(Method):
    """Base of methods that act inside the LLM: :meth:`reduce` is called once per stage, on hidden states.

    Those with a budget have the fields ``keep`` (tokens after the last stage) and ``average`` (over all blocks); those
    with several stages may have ``counts`` instead (what each stage leaves; shares are rounded down).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = getattr(self, "counts", None)
        if counts is not None:
            stages = len(getattr(self, "layers", counts))
            if len(counts) != stages or any(later > earlier for earlier, later in pairwise(counts)):
                raise Refusal(f"counts must be {stages} budgets, none larger than the one before; got {counts!r}")
            for budget in counts:
                check_budget(budget)

    @abstractmethod
    def stages(self, depth: int) -> list[int]:
        """Blocks before which tokens leave, ascending, in an LLM of ``depth`` blocks; use :func:`check_blocks`."""

    def per_stage(self, entered: int, depth: int) -> list[int] | None:
        """Tokens that each stage leaves of an image of which ``entered`` entered the LLM; ``None``: no budget.

        Raises:
            ValueError: if an average is out of reach.
        """
        counts, keep = getattr(self, "counts", None), getattr(self, "keep", None)
        if counts is not None:
            return [max(1, min(c if isinstance(c, int) else int(c * entered), entered)) for c in counts]
        if keep is None:
            return None
        return stage_counts(entered, depth, self.stages(depth), keep, getattr(self, "average", None))

    def check_average(self, depth: int) -> None:
        """Refuse, before there is an image, an average that no image can reach."""
        if isinstance(getattr(self, "average", None), float):
            self.per_stage(10**6, depth)

    def count(self, image: VisualTokens) -> int | None:
        depth = image.depth or 10**6  # outside of an LLM only single stages and counts make sense
        counts = self.per_stage(image.entered or image.total, depth)
        return None if counts is None else min(counts[image.stage], image.total)

    def wanted(self, image: VisualTokens) -> int:
        """:meth:`count` of a method that has a budget."""
        return self.count(image) or image.total


@dataclass(frozen=True)
class EncoderMethod(Method):
    """Base of methods that act inside the vision tower: :meth:`reduce` is called once per stage, on the rows there.

    Evidence is that of the stage's own layer: ``needs`` asks for layer −1 and ``image.at(name, -1)`` reads it. Each
    token may go into one slot only; slots may stand in any order, and the next stage finds them in that order.
    """

    behind: ClassVar[bool] = False  # tokens leave behind the whole layer; else between its attention and its MLP

    @abstractmethod
    def stages(self, depth: int) -> list[int]:
        """Layers in which tokens leave, ascending, of the ``depth`` that features come from; use `check_layers`."""

    @property
    def proportional(self) -> bool:
        """Whether later layers attend to a merged token as to that many patches (log of its size, added to scores)."""
        return False

    def per_stage(self, total: int, stages: int) -> list[int] | None:
        """Tokens that each stage leaves of ``total``; ``None``: no budget. Here: the same number leave at each.

        Raises:
            ValueError: if the budget is out of reach.
        """
        keep: Budget | None = getattr(self, "keep", None)
        if keep is None:
            return None
        gone = total - count(keep, total)
        return [total - round(gone * (stage + 1) / stages) for stage in range(stages)]

    def count(self, image: VisualTokens) -> int | None:
        counts = self.per_stage(image.entered or image.total, image.stages)
        return None if counts is None else min(counts[image.stage], image.total)

    def wanted(self, image: VisualTokens) -> int:
        """:meth:`count` of a method that has a budget."""
        return self.count(image) or image.total


def check_layers(layers: Sequence[int | float], depth: int) -> list[int]:
    """Layer numbers meant by ``layers`` in a tower of which ``depth`` layers are used: floats are shares of these.

    Shares that fall on one layer take the next ones, as far as there are any.

    Raises:
        ValueError: if there is no such layer.
    """
    wanted: list[int] = []
    for layer in layers:
        first = wanted[-1] + 1 if wanted else 0
        number = layer if isinstance(layer, int) else max(round(layer * depth), first)
        if isinstance(layer, int) or number < depth:
            wanted.append(number)
    if not wanted or wanted != sorted(set(wanted)) or wanted[0] < 0 or wanted[-1] >= depth:
        raise Refusal(
            f"tokens can leave in layers 0 to {depth - 1} of this tower, those that the features come from, in "
            f"ascending order; got {wanted or list(layers)}"
        )
    return wanted


def check_blocks(blocks: Sequence[int | float], depth: int) -> list[int]:
    """Block numbers meant by ``blocks`` in an LLM of ``depth`` blocks: floats are shares of the depth.

    Shares that fall on one block in a shallow LLM take the next ones.

    Raises:
        ValueError: if tokens cannot leave there.
    """
    wanted: list[int] = []
    for block in blocks:
        first = wanted[-1] + 1 if wanted else 1
        wanted.append(block if isinstance(block, int) else max(round(block * depth), first))
    if not wanted or wanted != sorted(set(wanted)) or wanted[0] < 1 or wanted[-1] >= depth:
        raise Refusal(f"tokens can leave before blocks 1 to {depth - 1} of this LLM, in ascending order; got {wanted}")
    return wanted


def _hint(cls: type, name: str) -> Any:
    """Resolved annotation of a field; ``None`` where a plug-in's annotations cannot be resolved."""
    try:
        return get_type_hints(cls).get(name)
    except Exception:  # a plug-in may annotate with names that do not exist at run time: then nothing is checked
        return None


WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", NoneType: "None"}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation allows; ``True`` for annotations that are not checked."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        return len(inner) != 2 or inner[1] is not Ellipsis or all(_fits(item, inner[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, NoneType) else True


def _in_words(hint: Any) -> str:
    """An annotation as an error says it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = [part for part in inner if not (part is int and float in inner)]  # every whole number is a number
        return " or ".join(map(_in_words, kinds))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin is tuple and inner:
        return f"a tuple, each item {_in_words(inner[0])}"
    return WORDS.get(hint, str(hint))
