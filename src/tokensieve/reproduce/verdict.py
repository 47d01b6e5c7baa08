"""The rule by which a published number counts as reproduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDEST = 0.05  # of the published number: every whole benchmark here meets it, a hundred questions do not


@dataclass(frozen=True)
class Verdict:
    """A published number beside a measured one.

    Attributes:
        published, value, low, high: the numbers, and the 95 % interval of the measured one.
        answer: "reproduced", "not reproduced" or "cannot tell".
        reason: one sentence, "" for "reproduced".
    """

    published: float
    value: float
    low: float
    high: float
    answer: str
    reason: str


def judge(
    published: float, value: float, low: float, high: float, obstacles: Sequence[str] = (), rounding: float = 0.0
) -> Verdict:
    """Compare a published number with a measured one and its 95 % interval.

    A published number is inside if any number that is printed so is inside: it may be off by ``rounding``.

    - *cannot tell*: something other than the method differs from the published protocol (``obstacles``), or the
      published number is inside an interval whose half is wider than 5 % of it;
    - *reproduced*: the published number is inside the interval;
    - *not reproduced*: it is outside.
    """
    inside = low - rounding <= published <= high + rounding
    half = (high - low) / 2
    if obstacles:
        answer, reason = "cannot tell", "; ".join(obstacles)
    elif inside and half > WIDEST * abs(published):
        answer, reason = "cannot tell", f"the interval is wide (± {half:.3g}): more questions narrow it"
    else:
        answer = "reproduced" if inside else "not reproduced"
        reason = "" if inside else f"{published:g} is outside {low:.4g} to {high:.4g}"
    return Verdict(published, value, low, high, answer, reason)
