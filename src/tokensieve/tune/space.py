"""The configurations that a search tries: methods × parameters × budgets × positions × composition."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args, get_origin

from tokensieve.budget import Budget
from tokensieve.engine import attach
from tokensieve.errors import Refusal
from tokensieve.evaluate.plan import Run, plan
from tokensieve.methods import Method, Positions, list_methods, parse
from tokensieve.methods.spec import expand
from tokensieve.methods.validate import hint_of

ALL = "all"
METHODS = (
    "vtc-cls", "fastervlm", "visionzip", "scope", "divprune", "cdpruner", "trsm", "mmtok", "pool", "downsample",
    "fastv", "pyramiddrop",
)  # fmt: skip
"""One or two methods of each kind: attention, diversity, coverage, the user's words, pooling, inside the LLM."""
KEEPS: tuple[Budget, ...] = (0.5, 0.33, 0.25, 0.16, 0.11)
# a stage in front of a method of this stage: a smaller image, or a half of the tokens, then the method
IN_FRONT = {"connector": "downsample(keep=0.5)", "decoder": "divprune(keep=0.5)"}


@dataclass(frozen=True)
class Candidate:
    """One configuration: a spec, its budget and the position ids of the kept tokens.

    Attributes:
        keep: budget of the stages that leave theirs open; ``None`` if there is none.
    """

    method: str
    keep: Budget | None = None
    positions: Positions = "original"

    @cached_property
    def run(self) -> Run:
        """The stages, and the key of their answers; that of original positions is the key in ``compare``."""
        run = plan([self.method], [] if self.keep is None else [self.keep], seeds=1, oracle=False)[-1].runs[0]
        return run if self.positions == "original" else Run(f"{run.key} positions={self.positions}", run.stages)

    @property
    def spec(self) -> str:
        """The full spec, with the budget of every stage."""
        return " + ".join(map(str, self.run.stages))

    def __str__(self) -> str:
        """Return the full spec, and the position ids where they are not the default."""
        return f"{self.spec}{', contiguous positions' * (self.positions == 'contiguous')}"


def space(
    methods: Sequence[str], keeps: Sequence[Budget], *, trials: int | None = None, seed: int = 0
) -> list[Candidate]:
    """Return the configurations to try: each method at each budget, then departures from them in random order.

    A departure changes one thing: a parameter that the spec leaves at its default (each other value of a choice; half
    and twice the layer inside the LLM), contiguous positions, or another stage in front.

    Args:
        methods: specs, as for ``compare``; ``"all"`` is each method with a budget. A spec that gives its budget is
            tried at this budget only.
        trials: most configurations; none: all.

    Raises:
        Refusal: unknown method or parameter, bad budget.
    """
    named = [info.name for info in list_methods() if "keep" in info.parameters and "seed" not in info.parameters]
    specs, _ = expand([spec for text in methods for spec in (named if text == ALL else [text])])
    if not specs or not keeps:
        raise Refusal(f"the search needs a method and a budget; got {list(methods)} and {list(keeps)}")
    plain = [candidate for spec in specs for candidate in _at_each(spec, keeps, "original")]
    departures = [candidate for spec in specs for candidate in _departures(spec, keeps)]
    random.Random(seed).shuffle(departures)
    # two texts may name the same configuration
    unique = list({candidate.run.key: candidate for candidate in reversed([*plain, *departures])}.values())
    return [candidate for candidate in reversed(unique) if not _keeps_everything(candidate)][:trials]


def attachable(model: Any, candidates: Sequence[Candidate], **options: Any) -> tuple[list[Candidate], dict[str, str]]:
    """Return the candidates that a model can run, and the reason of each method that it cannot, by spec.

    Args:
        options: as for ``attach``.
    """
    possible, refused = [], dict[str, str]()
    for candidate in candidates:
        try:
            attach(model, candidate.run.stages, **{**options, "positions": candidate.positions}).detach()
        except Refusal as error:
            refused.setdefault(candidate.method, str(error))
        else:
            possible.append(candidate)
    return possible, refused


def _at_each(spec: str, keeps: Sequence[Budget], positions: Positions) -> Iterator[Candidate]:
    """Yield a spec at each budget, or once if it gives its budget or has none."""
    # the first entry is the unreduced model, the others are the rows of the spec
    entries = plan([spec], keeps, seeds=1, oracle=False)[1:]
    if len(entries) == 1 and str(entries[0].runs[0].stages) == str(tuple(parse(spec))):
        yield Candidate(spec, None, positions)
        return
    for keep in keeps:
        yield Candidate(spec, keep, positions)


def _departures(spec: str, keeps: Sequence[Budget]) -> Iterator[Candidate]:
    yield from _at_each(spec, keeps, "contiguous")
    stages = parse(spec)
    if len(stages) > 1:
        return
    (method,) = stages
    for changed in _other_parameters(method, spec):
        yield from _at_each(changed, keeps, "original")
    if method.info.stage in IN_FRONT:
        yield from _at_each(f"{IN_FRONT[method.info.stage]} + {spec}", keeps, "original")


def _other_parameters(method: Method, spec: str) -> Iterator[str]:
    """Yield the spec with one parameter changed: another value of a choice, or half and twice the layer."""
    for field in dataclasses.fields(method):
        value, hint = getattr(method, field.name), hint_of(type(method), field.name)
        if value != field.default or field.name in method.in_training:
            continue  # the user's value, or one that changes no decision
        values: list[Any] = []
        if get_origin(hint) is Literal:
            values = [choice for choice in get_args(hint) if choice != value]
        elif field.name == "layer" and method.info.stage == "decoder":
            values = [value // 2, value * 2] if isinstance(value, int) else [value / 2, value * 2]
        for other in values:
            yield _with_argument(spec, f"{field.name}={other!r}")


def _with_argument(spec: str, argument: str) -> str:
    """Add an argument to a spec of one stage."""
    text = spec.strip()
    if not text.endswith(")"):
        return f"{text}({argument})"
    inside = text[:-1].rstrip()
    return f"{inside}{'' if inside.endswith(('(', ',')) else ', '}{argument})"


def _keeps_everything(candidate: Candidate) -> bool:
    return all(stage.keeps_everything for stage in candidate.run.stages)
