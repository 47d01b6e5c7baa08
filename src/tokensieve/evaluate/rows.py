"""Rows of a comparison: one method at one budget, with its accuracy, its costs and its paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokensieve.budget import Budget, budget_text
from tokensieve.evaluate.intervals import Clusters, Scores, in_points, ratio
from tokensieve.evaluate.verdict import Verdict

FULL, ORACLE, BLIND = "full", "oracle", "blind"  # names of the rows that are no method's


def label(method: str, keep: Budget | None) -> str:
    """Return a method and its budget: ``vtc-cls at 25%``."""
    return method if keep is None else f"{method} at {budget_text(keep)}"


@dataclass(frozen=True)
class TypeScore:
    """Accuracy on the questions of one type, with its 95 % interval.

    Attributes:
        samples: questions of the type.
        difference, difference_low, difference_high, difference_p: as in :class:`Row`, on these questions.
    """

    type: str
    samples: int
    accuracy: float
    low: float
    high: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    difference_p: float | None = None


@dataclass(frozen=True)
class VsRandom:
    """A row compared with random selection, paired by question.

    Attributes:
        tokens: average of random's tokens over the layers, at most a fifth more or fewer than the row's.
        accuracy: of random.
        difference, low, high: the row's accuracy minus random's, with its 95 % interval.
    """

    tokens: float
    accuracy: float
    difference: float
    low: float
    high: float

    @property
    def lost(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.high < 0

    @property
    def won(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low > 0


@dataclass(frozen=True)
class YesNo:
    """Scores of yes/no questions beside the accuracy, as POPE defines them; "yes" is the positive answer.

    Attributes:
        f1, f1_low, f1_high: 2 · precision · recall / (precision + recall), with its 95 % interval.
        precision: share of right answers among the answers "yes"; 0 without such answers.
        recall: share of right answers among the questions whose answer is "yes".
        yes_ratio: share of answers "yes".
    """

    f1: float
    f1_low: float
    f1_high: float
    precision: float
    recall: float
    yes_ratio: float

    @classmethod
    def of(cls, scores: Scores, positive: NDArray[np.bool_], clusters: Clusters) -> YesNo:
        """Compute them from the scores of the metric ``yes_no``.

        Args:
            scores: `[seeds, questions]`, 1 where the answer is right.
            positive: `[questions]`, whether "yes" is right.
        """
        expected = np.broadcast_to(positive.astype(float), scores.shape)
        answered_yes = np.where(positive, scores, 1 - scores)
        hits = answered_yes * expected
        return cls(
            *ratio(2 * hits, answered_yes + expected, clusters),
            precision=ratio(hits, answered_yes, clusters)[0],
            recall=ratio(hits, expected, clusters)[0],
            yes_ratio=float(answered_yes.mean()),
        )


@dataclass(frozen=True)
class Row:
    """One method at one budget; the fields and their order are those of ``compare --json``.

    Attributes:
        method: the spec as the user wrote it. "full" is the unhooked model. "oracle" is no method: it keeps the
            tokens of the asked object first (data with boxes only). "blind" is the model without the image: the
            prompt has no visual token.
        keep: the budget; ``None`` for full and for methods without one. Under ``keep_means="average"`` it is the
            requested average for methods inside the LLM.
        tokens_before, tokens_after: visual tokens per question, mean over the samples.
        tokens_average: tokens per image averaged over the LLM's layers (equal to tokens_after for methods that act
            before the LLM).
        samples: questions.
        accuracy, accuracy_low, accuracy_high: share in 0 … 1 with its 95 % interval (see
            :mod:`tokensieve.evaluate.intervals`).
        flops_ratio: prefill FLOPs / those of full. This field and all measured ones are ``None`` without a measurement.
        prefill_ms, prefill_speedup, method_ms, decode_ms_per_token, decode_speedup: medians for one prompt, from rounds
            that all rows share, with their quartiles ``…_low`` and ``…_high``; see :class:`tokensieve.measure.Cost`.
            A row's prefill_ms times its prefill_speedup is the prefill_ms of full; the same holds for decoding.
        peak_activation_mb, kv_mb: MB (10^6 bytes) for one prompt's prefill.
        break_even: "at once", "after" so many tokens, "never" or "not told apart"; ``None`` for full and for models
            that do not generate.
        break_even_tokens, break_even_low, break_even_high: generated tokens after which the method has paid for
            itself; ``None`` for no finite number.
        timing_note: the reason why the times are uncertain, such as a busy machine.
        difference, difference_low, difference_high: accuracy minus full's, paired by question, with its 95 % interval;
            ``None`` for full.
        difference_p: see :class:`PairedDifference`.
        random: the comparison with random; ``None`` for full and random themselves, and where random was not run with
            a similar number of tokens.
        types: accuracy by question type; empty when the data has no types.
        yes_no: F1 and its parts, for the metric ``yes_no``.
        referee: the referee's findings, see :mod:`tokensieve.evaluate.referee`; ``None`` while rows are missing.
    """

    method: str
    keep: Budget | None
    tokens_before: float
    tokens_after: float
    tokens_average: float
    samples: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    flops_ratio: float | None = None
    prefill_ms: float | None = None
    prefill_speedup: float | None = None
    method_ms: float | None = None
    decode_ms_per_token: float | None = None
    peak_activation_mb: float | None = None
    kv_mb: float | None = None
    prefill_ms_low: float | None = None
    prefill_ms_high: float | None = None
    prefill_speedup_low: float | None = None
    prefill_speedup_high: float | None = None
    method_ms_low: float | None = None
    method_ms_high: float | None = None
    decode_ms_per_token_low: float | None = None
    decode_ms_per_token_high: float | None = None
    decode_speedup: float | None = None
    decode_speedup_low: float | None = None
    decode_speedup_high: float | None = None
    break_even_tokens: float | None = None
    break_even_low: float | None = None
    break_even_high: float | None = None
    break_even: str | None = None
    timing_note: str | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    difference_p: float | None = None
    random: VsRandom | None = None
    types: tuple[TypeScore, ...] = ()
    yes_no: YesNo | None = None
    referee: Verdict | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields in order, for JSON."""
        referee = None if self.referee is None else self.referee.to_json()
        return {**asdict(self), "types": [asdict(score) for score in self.types], "referee": referee}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Invert :meth:`to_json`."""
        random, yes_no = (data[name] and kind(**data[name]) for name, kind in (("random", VsRandom), ("yes_no", YesNo)))
        types = tuple(TypeScore(**score) for score in data["types"])
        verdict = data.get("referee")  # not in older files
        referee = verdict and Verdict.from_json(verdict)
        return cls(**{**data, "random": random, "types": types, "yes_no": yes_no, "referee": referee})

    @property
    def label(self) -> str:
        """Method and budget, see :func:`label`."""
        return label(self.method, self.keep)

    def __repr__(self) -> str:
        tokens = f"{self.tokens_after:.4g} of {self.tokens_before:.4g} tokens"
        if self.tokens_average != self.tokens_after:
            tokens += f" ({self.tokens_average:.4g} on average)"
        accuracy = f"accuracy {in_points(self.accuracy, self.accuracy_low, self.accuracy_high)} %"
        if self.difference is not None and self.difference_low is not None and self.difference_high is not None:
            accuracy += f", {in_points(self.difference, self.difference_low, self.difference_high, sign='+')} to full"
        return f"Row({self.label}: {accuracy}, {tokens}, {self.samples} questions)"
