"""Budgets: an int keeps that many tokens per image, a float in (0, 1] keeps that share of the image's tokens.

A text is a rule by which the engine works out these numbers for each image: see :class:`BudgetRule`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias, cast, get_args

from tokensieve.errors import Refusal, nearest

Number: TypeAlias = int | float
Budget: TypeAlias = int | float | str
BudgetScope: TypeAlias = Literal["image", "sample", "sample-score", "tile", "clip", "frame"]
Criterion: TypeAlias = Literal["gain", "mass", "rank"]
RULES = ("layers", "average")


@dataclass(frozen=True)
class BudgetRule:
    """A budget in words: ``layers:64``, ``average:64``, ``average:11%:mass`` or ``average:64:gain:0.0123``.

    Attributes:
        mean: "layers" averages the tokens of an image over the layers of the LLM; "average" averages the tokens of
            all images, and each image keeps its own number.
        wanted: the average, in tokens or as a share of the image's tokens.
        criterion: for "average", the curve of an image that is cut at the threshold; see ``methods/adaptive.py``.
        threshold: for "average", the calibrated height of the cut; ``None``: not calibrated.
    """

    mean: Literal["layers", "average"]
    wanted: Number
    criterion: Criterion = "gain"
    threshold: float | None = None

    def __str__(self) -> str:
        text = f"{self.mean}:{self.wanted!r}"
        if self.mean == "average":
            text += f":{self.criterion}"
        return text if self.threshold is None else f"{text}:{self.threshold!r}"


def rule_of(keep: Budget | None) -> BudgetRule | None:
    """Return the rule of a budget in words; ``None`` for a number, or for no budget.

    Raises:
        Refusal: a text that is no rule; names the forms that are allowed.
    """
    if not isinstance(keep, str):
        return None
    mean, *parts = (part.strip() for part in keep.split(":"))
    if mean not in RULES or not 1 <= len(parts) <= (3 if mean == "average" else 1):
        forms = "'layers:64', 'average:64', 'average:25%:mass' or 'average:64:gain:0.01'"
        raise Refusal(f"a budget in words is {forms}; got {keep!r}")
    average = parse_number(parts[0])
    if mean == "layers":
        return BudgetRule("layers", average)
    criterion = parts[1] if len(parts) > 1 else "gain"
    if criterion not in get_args(Criterion):
        raise Refusal(f"{keep!r}: unknown criterion {criterion!r}; {nearest(criterion, get_args(Criterion))}")
    threshold = _threshold(parts[2], keep) if len(parts) > 2 else None
    return BudgetRule("average", average, cast(Criterion, criterion), threshold)


def _threshold(text: str, keep: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise Refusal(f"{keep!r}: the threshold must be a number of at least 0; got {text!r}")
    return value


def check_budget(keep: Budget) -> Budget:
    """Return ``keep`` unchanged if it is a number or a rule; raise a :class:`Refusal` that names the allowed values."""
    if isinstance(keep, str) and ":" in keep:
        rule_of(keep)
        return keep
    return check_number(keep)


def check_number(keep: Budget, name: str = "keep") -> Number:
    """Return ``keep`` unchanged if it is a number of tokens or a share; raise a :class:`Refusal` otherwise.

    Args:
        name: of the parameter, for the refusal.
    """
    allowed = "a whole number of tokens >= 1, or a share in (0, 1]"
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise Refusal(f"{name} must be {allowed}; got {keep!r}{_hint(keep, name)}")
    if (keep < 1) if isinstance(keep, int) else not 0 < keep <= 1:
        raise Refusal(f"{name} must be {allowed}; got {keep}")
    return keep


def _hint(keep: object, name: str) -> str:
    """Return the number that a budget in quotes probably means."""
    if not isinstance(keep, str):
        return ""
    try:
        return f"; write {name}={parse_number(keep.strip())!r}, without quotes"
    except Refusal:
        return ""


def parse_budget(text: str) -> Budget:
    """Parse a budget as typed by a user: ``64`` tokens, ``0.25``, ``1.0`` and ``25%`` shares, ``average:64`` a rule."""
    return check_budget(text) if ":" in text else parse_number(text)


def parse_number(text: str) -> Number:
    """Parse a number of tokens or a share; raise a :class:`Refusal` that names the allowed values otherwise."""
    try:
        if text.endswith("%"):
            return check_number(float(text[:-1]) / 100)
        return check_number(float(text) if any(c in text.lower() for c in ".en") else int(text))
    except ValueError as error:
        if "keep must be" in str(error):
            raise Refusal(f"{str(error).rpartition('; got ')[0]}; got {text}") from None
        raise Refusal(f"keep must be a whole number of tokens or a share in (0, 1]; got {text!r}") from None


def budget_text(keep: Budget) -> str:
    """Return a budget as a user writes it: ``36`` tokens, a share ``25%``, or a rule without its threshold."""
    rule = rule_of(keep)
    if rule is not None:
        return f"{rule.mean}:{budget_text(rule.wanted)}" + (f":{rule.criterion}" if rule.mean == "average" else "")
    assert not isinstance(keep, str)
    return f"{100 * keep:.4g}%" if isinstance(keep, float) else str(keep)


def count(keep: Budget, total: int) -> int:
    """Return the number of tokens that ``keep`` leaves of an image with ``total`` tokens: from 1 to ``total``."""
    keep = number(keep)
    tokens = keep if isinstance(keep, int) else round(keep * total)
    return min(max(tokens, 1), total)


def number(keep: Budget) -> Number:
    """Return a budget that is a number; refuse a rule, which only the engine can work out."""
    if isinstance(keep, str):
        raise Refusal(f"keep={keep!r} is worked out for each image of a model: attach() the method")
    return keep


def stage_counts(
    total: int, depth: int, layers: Sequence[int], keep: Budget, average: Number | None = None
) -> list[int]:
    """Return the number of tokens from each of the ``layers`` on, in an LLM of ``depth`` layers and ``total`` tokens.

    The numbers fall geometrically to ``keep``, or so that the mean over all layers is ``average``. An image of no more
    tokens than the average keeps all.

    Raises:
        Refusal: if these layers cannot reach the average; names the range that they can reach.
    """
    if average is None:
        last = count(keep, total)
        share = keep if isinstance(keep, float) else last / total
        shares = [share ** ((stage + 1) / len(layers)) for stage in range(len(layers) - 1)]
        return [*(max(last, int(total * part + 1e-9)) for part in shares), last]
    target = average if isinstance(average, int) else average * total
    if target >= total:
        return [total] * len(layers)
    spans = [end - start for start, end in zip(layers, [*layers[1:], depth], strict=True)]

    def mean(ratio: float) -> float:  # of the tokens over all layers, if each stage keeps `ratio` of the one before
        return total * (layers[0] + sum(n * ratio ** (s + 1) for s, n in enumerate(spans))) / depth

    lowest = layers[0] * total / depth
    if target <= lowest:
        raise Refusal(
            f"an average of {target:g} of {total} tokens is out of reach of stages at layers {list(layers)} of "
            f"{depth}; reachable: above {lowest:g}, up to {total}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection: the mean grows with the ratio
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < target else (low, middle)
    return [min(total, max(1, round(total * high ** (stage + 1)))) for stage in range(len(layers))]


def merge_counts(total: int, stages: int, keep: Budget, inflection: float = 0.0) -> list[int]:
    """Return the number of tokens after each of ``stages`` merges of ``total`` to ``keep``; none merges more than half.

    Args:
        inflection: 0 merges the same number at each stage; −1 merges more at early stages, 1 at late ones.

    Raises:
        Refusal: if halving at each stage leaves more than ``keep``.
    """
    dropped = total - count(keep, total)
    drops = ramp(dropped / stages, dropped / stages * (1 - inflection), stages)
    counts = [total - round(n) for n in accumulate(drops)]
    for stage in reversed(range(stages - 1)):  # if a stage would drop more than half, earlier stages drop more
        counts[stage] = min(counts[stage], 2 * counts[stage + 1])
    if 2 * counts[0] < total:
        raise Refusal(f"{keep} of {total} tokens are out of reach: {stages} layers can only halve them each")
    return counts


def ramp(mean: float, first: float, steps: int) -> list[float]:
    """Return ``steps`` numbers that change linearly from ``first`` and have this mean."""
    return [mean] if steps == 1 else [first + 2 * (mean - first) * step / (steps - 1) for step in range(steps)]


def share_out(keep: Budget, sizes: Sequence[int]) -> list[int]:
    """Split one budget over parts in proportion to their ``sizes``: exact in sum, and at least 1 each.

    A budget of fewer tokens than parts leaves one token each.
    """
    if not sizes:
        return []
    total = sum(sizes)
    spare, room = count(keep, total) - len(sizes), total - len(sizes)  # beyond the one token of each part
    if spare <= 0:
        return [1] * len(sizes)
    # largest remainders of spare * (size - 1) / room; of equals the earlier part
    counts = [1 + spare * (size - 1) // room for size in sizes]
    remainders = [spare * (size - 1) % room for size in sizes]
    for part in sorted(range(len(sizes)), key=lambda part: -remainders[part])[: count(keep, total) - sum(counts)]:
        counts[part] += 1
    return counts
