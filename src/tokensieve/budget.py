"""How many tokens to keep: an int is tokens per image, a float in (0, 1] a share of the image's tokens."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, TypeAlias

from tokensieve.errors import Refusal

Budget: TypeAlias = int | float
BudgetScope: TypeAlias = Literal["image", "sample", "sample-score", "tile", "clip", "frame"]


def check_budget(keep: Budget) -> Budget:
    """Return ``keep`` unchanged if it is a budget; raise ``ValueError`` naming what is allowed otherwise."""
    allowed = "a whole number of tokens >= 1, or a share in (0, 1]"
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise Refusal(f"keep must be {allowed}; got {keep!r}")
    if (keep < 1) if isinstance(keep, int) else not 0 < keep <= 1:
        raise Refusal(f"keep must be {allowed}; got {keep}")
    return keep


def parse_budget(text: str) -> Budget:
    """Read a budget as a user types it: ``64`` is tokens, ``0.25`` and ``1.0`` are shares, ``25%`` too."""
    try:
        if text.endswith("%"):
            return check_budget(float(text[:-1]) / 100)
        return check_budget(float(text) if any(c in text.lower() for c in ".en") else int(text))
    except ValueError as error:
        if "keep must be" in str(error):
            raise
        raise Refusal(f"keep must be a whole number of tokens or a share in (0, 1]; got {text!r}") from None


def count(keep: Budget, total: int) -> int:
    """Tokens that ``keep`` leaves of an image of ``total`` tokens: at least 1, at most ``total``."""
    wanted = keep if isinstance(keep, int) else round(keep * total)
    return min(max(wanted, 1), total)


def stage_counts(
    total: int, depth: int, blocks: Sequence[int], keep: Budget, average: Budget | None = None
) -> list[int]:
    """Tokens that stay from each of the ``blocks`` on, in an LLM of ``depth`` blocks that ``total`` tokens enter.

    The counts fall geometrically to ``keep``, or so that the mean over all blocks is ``average``. An average in tokens
    that the image does not exceed leaves it whole.

    Raises:
        ValueError: if the average cannot be reached by stages at these blocks; names the range that can.
    """
    if average is None:
        last = count(keep, total)
        share = keep if isinstance(keep, float) else last / total
        shares = [share ** ((stage + 1) / len(blocks)) for stage in range(len(blocks) - 1)]
        return [*(max(last, int(total * part + 1e-9)) for part in shares), last]
    wanted = average if isinstance(average, int) else average * total
    if wanted >= total:
        return [total] * len(blocks)
    spans = [after - before for before, after in zip(blocks, [*blocks[1:], depth], strict=True)]

    def mean(ratio: float) -> float:
        return total * (blocks[0] + sum(n * ratio ** (s + 1) for s, n in enumerate(spans))) / depth

    lowest = blocks[0] * total / depth
    if wanted <= lowest:
        raise Refusal(
            f"an average of {wanted:g} of {total} tokens is out of reach of stages at blocks {list(blocks)} of "
            f"{depth}; reachable: above {lowest:g}, up to {total}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):  # the mean grows with the ratio
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < wanted else (low, middle)
    return [min(total, max(1, round(total * high ** (stage + 1)))) for stage in range(len(blocks))]


def merge_counts(total: int, stages: int, keep: Budget, inflection: float = 0.0) -> list[int]:
    """Tokens that each of ``stages`` stages leaves of ``total`` so that ``keep`` are left, none losing more than half.

    Args:
        inflection: 0: the same number leaves at each stage; towards −1 more of them early, towards 1 late.

    Raises:
        ValueError: if even halving at each stage leaves more.
    """
    gone = total - count(keep, total)
    leave = ramp(gone / stages, gone / stages * (1 - inflection), stages)
    left = [total - round(n) for n in accumulate(leave)]
    for stage in reversed(range(stages - 1)):  # where a stage would have to lose more than half, more leave before
        left[stage] = min(left[stage], 2 * left[stage + 1])
    if 2 * left[0] < total:
        raise Refusal(f"{keep} of {total} tokens are out of reach: {stages} layers can only halve them each")
    return left


def ramp(mean: float, first: float, steps: int) -> list[float]:
    """``steps`` numbers on a line from ``first``, with this mean."""
    return [mean] if steps == 1 else [first + 2 * (mean - first) * step / (steps - 1) for step in range(steps)]


def share_out(keep: Budget, sizes: Sequence[int]) -> list[int]:
    """A budget for parts of the given ``sizes`` together, shared out by size: exact in sum, and at least 1 each.

    Fewer tokens than parts leave one each.
    """
    if not sizes:
        return []
    total = sum(sizes)
    spare, room = count(keep, total) - len(sizes), total - len(sizes)
    if spare <= 0:
        return [1] * len(sizes)
    # largest remainders of spare * (size - 1) / room; of equals the earlier part
    counts = [1 + spare * (size - 1) // room for size in sizes]
    remainders = [spare * (size - 1) % room for size in sizes]
    for part in sorted(range(len(sizes)), key=lambda part: -remainders[part])[: count(keep, total) - sum(counts)]:
        counts[part] += 1
    return counts
