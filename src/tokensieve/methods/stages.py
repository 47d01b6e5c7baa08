"""The bases of methods that act inside a model: in the vision encoder, before it, or in the LLM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from tokensieve.budget import Budget, check_number, count, stage_counts
from tokensieve.errors import Refusal
from tokensieve.methods.base import Method
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens, EncoderTokens, VisualTokens


@dataclass(frozen=True)
class InsideMethod(Method):
    """Base of methods that act in layers: in those of the parameter ``layers``, or in the one of ``layer``."""

    @property
    def stated_layers(self) -> Sequence[int | float]:
        """The layers as the parameters state them; a float is a share of the depth."""
        layers: Sequence[int | float] | None = getattr(self, "layers", None)
        return (self.layer,) if layers is None else layers  # type: ignore[attr-defined]

    @abstractmethod
    def layer_numbers(self, depth: int) -> list[int]:
        """Return the layers in which tokens leave, ascending, in a model part of ``depth`` layers.

        Raises:
            Refusal: if tokens cannot leave there.
        """


@dataclass(frozen=True)
class DecoderMethod(InsideMethod):
    """Base of methods that act inside the LLM: :meth:`reduce` is called before each of its layers, on hidden states.

    Budgets are ``keep`` (tokens after the last of its layers), ``average`` (tokens averaged over all layers of the LLM)
    or, for a method with several layers, ``counts`` (tokens after each of them; shares are rounded down).
    """

    adaptive: ClassVar[bool] = False  # the numbers after each layer follow the image: see :meth:`schedule`
    leaves_caches: ClassVar[bool] = False  # tokens that leave also leave the KV caches of the layers before

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = getattr(self, "counts", None)
        if counts is not None:
            stages = len(self.stated_layers)
            if len(counts) != stages or any(later > earlier for earlier, later in pairwise(counts)):
                raise Refusal(f"counts must be {stages} budgets, none larger than the one before; got {counts!r}")
            for budget in counts:
                check_number(budget, "each of counts")

    def layer_numbers(self, depth: int) -> list[int]:
        numbers = number_layers(self.stated_layers, depth, first=1)
        check_ascending(numbers, 1, depth, f"before layers 1 to {depth - 1} of this LLM")
        return numbers

    def stage_budgets(self, total: int, layers: Sequence[int], depth: int) -> list[int] | None:
        counts = getattr(self, "counts", None)
        if counts is not None:
            return [max(1, min(c if isinstance(c, int) else int(c * total), total)) for c in counts]
        if self.budget is None:
            return None
        return stage_counts(total, depth, layers, self.budget, getattr(self, "average", None))

    @property
    def mean(self) -> Budget | None:
        """The budget as an average over all layers of the LLM; ``None`` if it has another meaning."""
        average: Budget | None = getattr(self, "average", None)
        return average

    def check_average(self, layers: Sequence[int], depth: int) -> None:
        """Refuse, before there is an image, an average that no image can reach."""
        average, lowest = self.mean, layers[0] / depth  # all tokens pass the first layers
        if getattr(self, "counts", None) is None and isinstance(average, float) and average <= lowest:
            raise Refusal(
                f"{self}: an average of {average:.4g} of the tokens is out of reach if they leave at layers "
                f"{list(layers)} of {depth}; reachable: above {lowest:.4g}, up to 1"
            )

    def schedule(self, image: DecoderTokens, layers: Sequence[int], depth: int) -> list[list[int]]:
        """Return the tokens that stay of each image after each of the ``layers``, `[image][layer]`.

        The engine calls it for an ``adaptive`` method, once, before the first of its layers, with the evidence there.
        From then on, ``image.budget`` follows the image's own numbers. :meth:`stage_budgets` gives those of an image
        that is not known.
        """
        raise NotImplementedError(f"{self.info.name} is adaptive: define schedule()")

    @abstractmethod
    def reduce(self, image: DecoderTokens) -> Reduction: ...


@dataclass(frozen=True)
class EncoderMethod(InsideMethod):
    """Base of methods that act inside the vision encoder: :meth:`reduce` is called in each of its layers, on the rows.

    Each token may merge into one slot only. Slots may stand in any order; the next layer receives them in that order.
    """

    after_layer: ClassVar[bool] = False  # tokens leave after the whole layer; else between its attention and its MLP
    adaptive: ClassVar[bool] = False  # images differ in their numbers in between, and agree in the last of its layers

    @property
    def proportional(self) -> bool:
        """Whether later layers attend to a merged token as to its number of patches: its log is added to the scores."""
        return False

    def layer_numbers(self, depth: int) -> list[int]:
        # shares that fall behind the last layer of a shallow vision encoder are left out
        numbers = [n for n in number_layers(self.stated_layers, depth, first=0) if n < depth or n in self.stated_layers]
        where = f"in layers 0 to {depth - 1} of this vision encoder, those that the features come from"
        check_ascending(numbers or list(self.stated_layers), 0, depth, where)
        return numbers

    def stage_budgets(self, total: int, layers: Sequence[int], depth: int) -> list[int] | None:
        """Return the tokens that stay after each layer; equally many leave in each."""
        if self.budget is None:
            return None
        leaving = total - count(self.budget, total)
        return [total - round(leaving * (stage + 1) / len(layers)) for stage in range(len(layers))]

    @abstractmethod
    def reduce(self, image: EncoderTokens) -> Reduction: ...


@dataclass(frozen=True)
class ResizeMethod(Method):
    """Base of methods that resize an image before the vision encoder, so that fewer tokens are made."""

    @abstractmethod
    def cells(self, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        """Return (height, width) in tokens of the smaller image."""

    @abstractmethod
    def reduce(self, image: VisualTokens) -> Reduction: ...


@dataclass(frozen=True)
class PixelMethod(Method):
    """Base of methods that choose tokens by their pixels: the vision encoder then processes the kept patches only.

    :meth:`reduce` receives one still image. Its ``features`` `[1, N, d]` are the d pixel values of each token, float32,
    white 1 and black 0.
    """

    @abstractmethod
    def reduce(self, image: VisualTokens) -> Reduction: ...


def number_layers(layers: Sequence[int | float], depth: int, *, first: int) -> list[int]:
    """Return layer numbers: a float is a share of the depth, and shares that fall on one layer take the next ones."""
    numbers: list[int] = []
    for layer in layers:
        earliest = numbers[-1] + 1 if numbers else first
        numbers.append(layer if isinstance(layer, int) else max(round(layer * depth), earliest))
    return numbers


def check_ascending(numbers: Sequence[int | float], first: int, depth: int, where: str) -> None:
    """Refuse layers that do not ascend from ``first`` to ``depth - 1``."""
    if not numbers or list(numbers) != sorted(set(numbers)) or numbers[0] < first or numbers[-1] >= depth:
        raise Refusal(f"tokens can leave {where}, in ascending order; got {list(numbers)}")
