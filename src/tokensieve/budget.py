"""Budgets: an int keeps that many tokens per image, a float in (0, 1] keeps that share of the image's tokens."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, TypeAlias

from tokensieve.errors import Refusal

Budget: TypeAlias = int | float
BudgetScope: TypeAlias = Literal["image", "sample", "sample-score", "tile", "clip", "frame"]


def check_budget(keep: Budget) -> Budget:
    """Return ``keep`` unchanged if it is a budget; raise a :class:`Refusal` that names the allowed values otherwise."""
    allowed = "a whole number of tokens >= 1, or a share in (0, 1]"
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise Refusal(f"keep must be {allowed}; got {keep!r}{_hint(keep)}")
    if (keep < 1) if isinstance(keep, int) else not 0 < keep <= 1:
        raise Refusal(f"keep must be {allowed}; got {keep}")
    return keep


def _hint(keep: object) -> str:
    """Return the number that a budget in quotes probably means."""
    if not isinstance(keep, str):
        return ""
    try:
        return f"; write keep={parse_budget(keep.strip())!r}, without quotes"
    except Refusal:
        return ""


def parse_budget(text: str) -> Budget:
    """Parse a budget as typed by a user: ``64`` is a number of tokens; ``0.25``, ``1.0`` and ``25%`` are shares."""
    try:
        if text.endswith("%"):
            return check_budget(float(text[:-1]) / 100)
        return check_budget(float(text) if any(c in text.lower() for c in ".en") else int(text))
    except ValueError as error:
        if "keep must be" in str(error):
            raise Refusal(f"{str(error).rpartition('; got ')[0]}; got {text}") from None
        raise Refusal(f"keep must be a whole number of tokens or a share in (0, 1]; got {text!r}") from None


def budget_text(keep: Budget) -> str:
    """Return a budget as a user writes it: ``36`` tokens, or a share ``25%``."""
    return f"{100 * keep:.4g}%" if isinstance(keep, float) else str(keep)


def count(keep: Budget, total: int) -> int:
    """Return the number of tokens that ``keep`` leaves of an image with ``total`` tokens: from 1 to ``total``."""
    tokens = keep if isinstance(keep, int) else round(keep * total)
    return min(max(tokens, 1), total)


def stage_counts(
    total: int, depth: int, layers: Sequence[int], keep: Budget, average: Budget | None = None
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
