"""The timing figures of a row, all computed from the same paired rounds, so that they agree with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tokensieve.measure.latency import Spread, paired_ratio

BreakEven: TypeAlias = Literal["at once", "after", "never", "not told apart"]

FEW_ROUNDS = 5  # the quartiles of fewer rounds are almost single rounds: no verdict is given


@dataclass(frozen=True)
class Rounds:
    """Times of one candidate in milliseconds, one per round of a session that all candidates share.

    Attributes:
        prefill: of the prefill.
        decode: per generated token; ``None`` for a model that does not generate.
        replay: of the prefill with a replay of the method's decisions; ``None`` where no replay does the same work.
    """

    prefill: Sequence[float]
    decode: Sequence[float] | None = None
    replay: Sequence[float] | None = None


@dataclass(frozen=True)
class Timing:
    """Timing figures of one row. The attributes are those of :class:`tokensieve.measure.Cost`.

    A method's times are derived: ``prefill_ms`` is the unhooked model's median time divided by the paired speedup, and
    so on. The figures of a table can then be divided and subtracted by hand, and agree with each other.
    """

    prefill_ms: Spread
    prefill_speedup: Spread
    method_ms: Spread | None
    decode_ms_per_token: Spread | None
    decode_speedup: Spread | None
    break_even: BreakEven | None = None
    break_even_tokens: float | None = None
    break_even_low: float | None = None
    break_even_high: float | None = None

    @classmethod
    def of_full(cls, full: Rounds) -> Timing:
        """Return the figures of the unhooked model; the quartiles of its times are those of the rounds."""
        same = Spread(1.0, 1.0, 1.0)
        decode = None if full.decode is None else Spread.of(full.decode)
        return cls(Spread.of(full.prefill), same, None, decode, decode and same)

    @classmethod
    def of_method(cls, full: Rounds, method: Rounds) -> Timing:
        """Return the figures of a method beside the unhooked model, which ran in the same rounds."""
        full_ms, speedup = Spread.of(full.prefill).median, paired_ratio(full.prefill, method.prefill)
        prefill = _divide(full_ms, speedup)
        cost = None
        if method.replay is not None:
            # the share of the prefill that a replay of the same decisions does not need
            share = paired_ratio(method.replay, method.prefill)
            cost = Spread(*(prefill.median * (1 - part) for part in (share.median, share.high, share.low)))
        if full.decode is None or method.decode is None:
            return cls(prefill, speedup, cost, None, None)
        full_step, faster = Spread.of(full.decode).median, paired_ratio(full.decode, method.decode)
        verdict, *tokens = break_even(full_ms, speedup, full_step, faster, rounds=len(full.prefill))
        return cls(prefill, speedup, cost, _divide(full_step, faster), faster, verdict, *tokens)


def break_even(
    full_ms: float, prefill: Spread, full_step_ms: float, decode: Spread, *, rounds: int = FEW_ROUNDS
) -> tuple[BreakEven, float | None, float | None, float | None]:
    """Return the verdict, and the number of tokens from which on every longer answer is faster with the method.

    "at once": the prefill is faster, and decoding is no slower in the median. "after": the prefill is slower and
    decoding faster. "never": both are slower, or decoding is as fast. These need the quartiles on one side of 1; all
    else is "not told apart".

    Args:
        full_ms, full_step_ms: prefill and decoding step of the unhooked model.
        prefill, decode: paired speedups.
        rounds: number of rounds behind the quartiles.

    Returns:
        The verdict; the number at the medians (only for "at once", where it is 0, and "after"); the numbers at the
        better and at the worse quartiles. ``None`` stands for no finite number.
    """

    def tokens(prefill_speedup: float, decode_speedup: float) -> float | None:
        if decode_speedup < 1 or (decode_speedup == 1 and prefill_speedup < 1):
            return None
        if prefill_speedup >= 1:
            return 0.0
        extra_ms = full_ms / prefill_speedup - full_ms
        saved_ms = full_step_ms - full_step_ms / decode_speedup
        # the quotient overflows, or the difference vanishes in rounding, where next to nothing is saved
        quotient = extra_ms / saved_ms if saved_ms > 0 else float("inf")
        return quotient if quotient < float("inf") else None

    low, high = tokens(prefill.high, decode.high), tokens(prefill.low, decode.low)
    median = tokens(prefill.median, decode.median)
    if rounds < FEW_ROUNDS:
        return "not told apart", None, None, None
    if prefill.low > 1 and decode.median >= 1:
        return "at once", 0.0, 0.0, 0.0
    if prefill.high < 1 and decode.low > 1 and median is not None:
        return "after", median, low, high
    if prefill.high < 1 and decode.high <= 1:
        return "never", None, None, None
    return "not told apart", None, low, high


def _divide(value: float, spread: Spread) -> Spread:
    """Return ``value / spread``: the larger the divisor, the smaller the quotient."""
    return Spread(value / spread.median, value / spread.high, value / spread.low)
