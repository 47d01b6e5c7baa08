"""Findings of the referee about one row of a comparison; see :mod:`tokensieve.evaluate.referee`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from tokensieve.budget import Budget

Reference: TypeAlias = Literal["full", "random", "downsample", "runner-up", "equal time"]
Group: TypeAlias = Literal["needs image", "hard", "easy", "hard, full right", "easy, full right"]


@dataclass(frozen=True)
class Against:
    """A row compared with another row, paired by question.

    Attributes:
        reference: the other row's part: "full"; "random", "downsample" or "runner-up" (the next accurate row) with
            about as many tokens; "equal time", the baseline whose prefill time is nearest.
        method, keep, tokens: the other row, and its tokens averaged over the LLM's layers.
        difference, low, high: the row's accuracy minus the other's, with its 95 % interval.
        p: McNemar's exact p-value, see :func:`tokensieve.evaluate.referee.exact_p`; ``None`` for graded scores.
        p_holm: the p-value after Holm's correction over the ``tests`` rows that are compared with this reference.
        time_ratio: for "equal time", the other row's prefill time / this row's.
    """

    reference: Reference
    method: str
    keep: Budget | None
    tokens: float
    difference: float
    low: float
    high: float
    p: float | None = None
    p_holm: float | None = None
    tests: int = 1
    time_ratio: float | None = None


@dataclass(frozen=True)
class GroupScore:
    """Accuracy on a group of questions that another row chose.

    Attributes:
        group: "needs image" (blind is wrong), "hard" and "easy" (downsample is wrong, right), and the same among the
            questions that full answers right.
        by: method and budget of the row that chose the questions.
        samples: questions in the group.
        few: whether they are too few to conclude anything.
        accuracy, low, high: with the 95 % interval; ``None`` without questions.
        difference, difference_low, difference_high: to random with about as many tokens, on these questions; ``None``
            without such a row, for random itself, and where the questions are too few.
    """

    group: Group
    by: str
    samples: int
    few: bool
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None


@dataclass(frozen=True)
class Guard:
    """A loss against full on a guarded question type, which the mean hides.

    Attributes:
        type, samples: the type and its questions.
        difference, low, high: accuracy minus full's on this type, with its 95 % interval.
        mean: the difference over all questions.
    """

    type: str
    samples: int
    difference: float
    low: float
    high: float
    mean: float


@dataclass(frozen=True)
class Overlap:
    """Mean Jaccard index of the kept tokens' places, on the example images: 1 is the same places.

    Attributes:
        images: examples that were compared.
        pixels: largest number of pixels by which an image was moved.
        shift: of the image against the image moved a little, right and down.
        seeds: of two seeds; ``None`` for one seed.
        chance: of two independent draws of as many tokens.
        answers: share of the examples whose answer stays the same when the image moves.
    """

    images: int
    pixels: int
    shift: float
    seeds: float | None
    chance: float
    answers: float


@dataclass(frozen=True)
class Verdict:
    """Findings of the referee about one row.

    Attributes:
        seeds: runs of the row.
        seed_low, seed_high: accuracy of the worst and of the best seed; ``None`` for one seed.
        against: comparisons with other rows.
        groups: accuracy on groups of questions.
        guards: losses that the mean hides.
        overlap: stability of the kept places.
    """

    seeds: int = 1
    seed_low: float | None = None
    seed_high: float | None = None
    against: tuple[Against, ...] = ()
    groups: tuple[GroupScore, ...] = ()
    guards: tuple[Guard, ...] = ()
    overlap: Overlap | None = None

    def to(self, reference: Reference) -> Against | None:
        """Return the comparison with a reference; ``None`` if there was no such row."""
        return next((against for against in self.against if against.reference == reference), None)

    def group(self, name: Group) -> GroupScore | None:
        """Return the accuracy on a group of questions; ``None`` if no row chose it."""
        return next((score for score in self.groups if score.group == name), None)

    def to_json(self) -> dict[str, Any]:
        """Return the fields in order, for JSON."""
        fields = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verdict:
        """Invert :meth:`to_json`."""
        return cls(
            **{
                **data,
                "against": tuple(Against(**part) for part in data["against"]),
                "groups": tuple(GroupScore(**part) for part in data["groups"]),
                "guards": tuple(Guard(**part) for part in data["guards"]),
                "overlap": data["overlap"] and Overlap(**data["overlap"]),
            }
        )
