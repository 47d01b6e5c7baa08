"""The base of all methods: a frozen dataclass with ``reduce``, and its public record."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from tokensieve.budget import Budget, check_budget, check_number, count
from tokensieve.errors import Refusal
from tokensieve.methods.needs import StageNeeds
from tokensieve.methods.validate import describe, fits, hint_of, plain
from tokensieve.ops import top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens

Stage: TypeAlias = Literal["encoder", "connector", "decoder", "fusion"]
Positions: TypeAlias = Literal["original", "contiguous"]
Repair: TypeAlias = Literal["size", "restore"]
AnyMethod = TypeVar("AnyMethod", bound="Method")


@dataclass(frozen=True)
class MethodInfo:
    """The public record of a registered method; ``parameters`` maps each field to its default."""

    name: str
    title: str
    paper: str
    stage: Stage
    needs: StageNeeds
    trained: bool
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. Subclasses add their parameters as fields and implement :meth:`reduce`.

    A field named ``keep`` is the budget. Every field is checked against its annotation on creation.
    """

    info: ClassVar[MethodInfo]
    keeps_everything: ClassVar[bool] = False  # the unreduced model: no token is ever dropped
    makes_rows: ClassVar[bool] = False  # a net makes the rows of the slots: :meth:`VisualTokens.made`
    changes_text: ClassVar[bool] = False  # blocks of its net, ``prefusion_layers``, change the text that enters the LLM
    least: ClassVar[Mapping[str, int]] = {}  # the smallest allowed value of a parameter
    proportions: ClassVar[tuple[str, ...]] = ()  # parameters that lie in [0, 1]
    in_training: ClassVar[tuple[str, ...]] = ()  # parameters that play a part in training only

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, hint = plain(getattr(self, field.name)), hint_of(type(self), field.name)
            object.__setattr__(self, field.name, value)  # as a literal, so that parse() reads the printed spec back
            allowed = get_args(hint)
            if field.name in ("keep", "average") and not (value is None and type(None) in allowed):
                check_budget(value) if field.name == "keep" else check_number(value, field.name)
            elif allowed and all(isinstance(a, str) for a in allowed) and value not in allowed:
                raise Refusal(f"{field.name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
            elif not fits(value, hint):
                raise Refusal(f"{field.name} must be {describe(hint)}; got {value!r}")
            elif field.name in self.least and value < self.least[field.name]:
                raise Refusal(f"{field.name} must be at least {self.least[field.name]}; got {value}")
            elif field.name in self.proportions and not 0 <= value <= 1:
                raise Refusal(f"{field.name} must be a share in [0, 1]; got {value!r}")

    @property
    def needs(self) -> StageNeeds:
        """The evidence that this instance requests; override it where it depends on the parameters."""
        return self.info.needs

    @property
    def by_score(self) -> bool:
        """Whether the tokens with the largest scores stay, and scores compare across images."""
        return False

    @property
    def budget(self) -> Budget | None:
        """The field ``keep``: a number or a rule; ``None`` for a method without one, or that adapts to the image."""
        keep: Budget | None = getattr(self, "keep", None)
        return keep

    @property
    def reads_question(self) -> bool:
        """Whether the decision depends on words after the image, so that another question has other tokens."""
        return any(map(self.needs.requests, ("user_text", "attention", "gradient", "query_attention")))

    def with_budget(self: AnyMethod, keep: Budget) -> AnyMethod:
        """Return the same method with another ``keep``."""
        changes: dict[str, Any] = {"keep": keep}
        return replace(self, **changes)

    def stage_budgets(self, total: int, layers: Sequence[int], depth: int) -> list[int] | None:
        """Return the tokens that stay of an image of ``total`` tokens, after each of the layers in which tokens leave.

        Args:
            layers: as :meth:`layer_numbers` of the method returns them; a connector method has one entry.
            depth: layers of the model part in which the method acts.

        Returns:
            One number per entry of ``layers``; ``None`` for a method without a budget.

        Raises:
            Refusal: if the budget is out of reach.
        """
        return None if self.budget is None else [count(self.budget, total)]

    def image_budget(self, total: int, layers: Sequence[int] = (0,), depth: int = 1, stage: int = -1) -> int:
        """Return the tokens that stay after one stage of :meth:`stage_budgets`; 0 for a method without a budget."""
        budgets = self.stage_budgets(total, layers, depth)
        return 0 if budgets is None else budgets[stage]

    def slots(self, budget: int, grid: tuple[int, int] | None) -> int | None:
        """Return the number of slots that the method makes of an image for ``budget`` tokens.

        ``None``: the image's content decides. Serving engines reserve this number before the image is encoded.
        """
        return None if self.budget is None else budget

    @abstractmethod
    def reduce(self, image: Any) -> Reduction:
        """Decide for B images of equal size at once. ``image.budget`` is the number of tokens to keep of each image."""

    def __call__(self, image: Any) -> Reduction:
        """Call :meth:`reduce`, unless the image is kept whole: then return the identity and a note with the reason."""
        batch, total, _ = image.features.shape
        # outside of a model no budget is worked out; inside the LLM 0 may be one, and is a share of what entered
        budget = image.budget or self.image_budget(getattr(image, "entered", None) or total)
        if self.needs.requests("video") and image.frames is None:
            note = f"kept whole: {self.info.name} reduces videos, and this is an image"
        elif budget and budget >= total:
            note = f"kept whole: the budget of {self} covers all of its {total} tokens"
        else:
            return self._verified(self.reduce(replace(image, budget=budget or total)), image.features)
        return Reduction.identity(total, batch, image.features.device, grid=image.grid, notes=(note,))

    def _verified(self, decision: Reduction, rows: Tensor) -> Reduction:
        """Return the decision about ``rows`` `[B, N, D]`, if it is one.

        Raises:
            TypeError, ValueError: a decision about other images, or with a token twice: a bug in :meth:`reduce`.
        """
        if not isinstance(decision, Reduction):
            raise TypeError(f"reduce() of {self.info.name} must return a Reduction; got {type(decision).__name__}")
        (batch, total, _), shape = rows.shape, list(decision.anchors.shape)
        if decision.anchors.device != rows.device:
            fault: str | None = f"anchors must be on {rows.device}; got {decision.anchors.device}"
        elif decision.total != total or len(shape) != 2 or shape[0] != batch:
            fault = f"anchors must be [{batch}, K] of {total} tokens; got {shape} of {decision.total}"
        elif decision.rows is not None and not (self.makes_rows and self.info.stage == "connector"):
            fault = "only a connector method whose class sets makes_rows can make rows"
        else:  # values only on a CPU: the host would wait for a GPU
            values = rows.is_cpu and not torch.compiler.is_compiling()
            fault = decision.fault(values, ascending=self.info.stage != "encoder")
        if fault is not None:
            raise ValueError(f"reduce() of {self.info.name} returned a wrong Reduction: {fault}")
        return decision

    def __str__(self) -> str:
        """Return the spec that :func:`~tokensieve.parse` reads back: the budget, and parameters other than default."""
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.name == "keep" or getattr(self, f.name) != f.default
        ]
        return self.info.name + (f"({', '.join(shown)})" if shown else "")


@dataclass(frozen=True)
class ConnectorMethod(Method):
    """Base of methods that act between vision encoder and LLM."""

    @abstractmethod
    def reduce(self, image: ConnectorTokens) -> Reduction: ...


@dataclass(frozen=True)
class ScoreMethod(Method):
    """Base of methods that keep the tokens with the largest score; inside the LLM `(ScoreMethod, DecoderMethod)`."""

    @property
    def by_score(self) -> bool:
        return True

    @abstractmethod
    def score(self, image: Any) -> Tensor:
        """Return the score of each token, `[B, N]`; of equals the earlier token ranks higher."""

    def reduce(self, image: Any) -> Reduction:
        scores = self.score(image)
        return image.keep(top_k(scores, image.budget), scores)  # type: ignore[no-any-return]
