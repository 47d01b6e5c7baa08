"""Results of a comparison: the rows of the table and the data of the report. They can be read without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokensieve.errors import OutputError, Refusal
from tokensieve.evaluate.intervals import PairedDifference, paired_difference

VERSION = 3
FULL, ORACLE = "full", "oracle"  # names of the two rows that are no method's


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
class Row:
    """One method at one budget; the fields and their order are those of ``compare --json``.

    Attributes:
        method: the spec as the user wrote it. "full" is the unhooked model. "oracle" is no method: it keeps the
            tokens of the asked object first (data with boxes only).
        keep: the budget; ``None`` for full and for methods without one. Under ``keep_means="average"`` it is the
            requested average for methods inside the LLM.
        tokens_before, tokens_after: visual tokens per image, mean over the samples.
        tokens_average: tokens per image averaged over the LLM's layers (equal to tokens_after for methods that act
            before the LLM).
        samples: questions.
        accuracy, accuracy_low, accuracy_high: share in 0 … 1 with its 95 % interval (see
            :mod:`tokensieve.evaluate.intervals`).
        flops_ratio: prefill FLOPs / those of full. This field and all measured ones are ``None`` without a measurement.
        prefill_ms, prefill_speedup, method_ms, decode_ms_per_token, decode_speedup: medians for one prompt, see
            :class:`tokensieve.measure.Cost`. Each ``_low`` and ``_high`` is a quartile of the paired rounds.
        peak_activation_mb, kv_mb: MB (10^6 bytes) for one prompt's prefill.
        break_even_tokens: generated tokens after which the time saved exceeds the extra prefill time; ``None`` where
            no number does.
        break_even: "at once", "after", "never" or "not told apart".
        timing_note: a reason to distrust the times, such as a busy machine.
        difference, difference_low, difference_high: accuracy minus full's, paired by question, with its 95 % interval;
            ``None`` for full.
        difference_p: see :class:`PairedDifference`.
        random: the comparison with random; ``None`` for full and random themselves, and where random was not run with
            a similar number of tokens.
        types: accuracy by question type; empty when the data has no types.
    """

    method: str
    keep: int | float | None
    tokens_before: float
    tokens_after: float
    tokens_average: float
    samples: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    flops_ratio: float | None
    prefill_ms: float | None
    prefill_speedup: float | None
    method_ms: float | None
    decode_ms_per_token: float | None
    peak_activation_mb: float | None
    kv_mb: float | None
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

    def to_json(self) -> dict[str, Any]:
        """Return the fields in order, for JSON."""
        return {**asdict(self), "types": [asdict(score) for score in self.types]}


@dataclass(frozen=True)
class Question:
    """One question of the data.

    Attributes:
        type: kind of question; "" when the data has none.
        cluster: number of its image, in order of appearance. Questions about one image are not independent.
    """

    id: str
    type: str
    cluster: int


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be read and is in no row.

    Attributes:
        where: file and line.
        reason: one line.
    """

    id: str
    where: str
    reason: str


@dataclass(frozen=True)
class Example:
    """One image and question, with the decision and the answer of every row.

    Attributes:
        image: PNG file, relative to the results file.
        kept: one entry per row: ``{"method", "keep", "prediction", "reductions": [Reduction.to_json() per image]}``.
            A row of several seeds shows its first run.
    """

    id: str
    image: str
    question: str
    answers: tuple[str, ...]
    kept: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Results:
    """All results of ``compare``; ``results.json`` is their JSON.

    Attributes:
        complete: False while rows are missing.
        environment: versions, hardware, date (see :func:`tokensieve.evaluate.environment`).
        settings: model, samples, metric, seeds, batch size and the like.
        rows: full first.
        questions: the scored questions.
        scores: for each row, its scores by seed and question, 0 … 1.
        skipped: samples that could not be read.
        examples: the same images for every row.
    """

    complete: bool
    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    questions: tuple[Question, ...] = ()
    scores: tuple[tuple[tuple[float, ...], ...], ...] = ()
    skipped: tuple[Skipped, ...] = ()
    examples: tuple[Example, ...] = ()

    def row(self, method: str, keep: float | None = None) -> Row:
        """Return the row of a method at a budget; without ``keep``, its first row.

        Raises:
            Refusal: there is no such row.
        """
        for row in self.rows:
            if row.method == method and keep in (None, row.keep):
                return row
        names = ", ".join(_label(row) for row in self.rows)
        raise Refusal(f"no row {method!r}{'' if keep is None else f' at {keep}'}; the rows are {names}")

    def paired(self, row: Row, other: Row, type: str | None = None) -> PairedDifference:
        """Return the mean score of a row minus that of another, paired by question.

        Args:
            row, other: two of :attr:`rows`.
            type: compare on the questions of this type only.

        Raises:
            Refusal: no question of this type.
        """
        chosen = [i for i, question in enumerate(self.questions) if type in (None, question.type)]
        if not chosen:
            types = dict.fromkeys(question.type for question in self.questions)
            raise Refusal(f"no question of type {type!r}; the types are {', '.join(map(repr, types))}")
        clusters = np.array([self.questions[i].cluster for i in chosen])
        first, second = (np.array(self.scores[self.rows.index(row)])[:, chosen] for row in (row, other))
        return paired_difference(first, second, clusters)

    def save(self, path: str | Path) -> None:
        """Write the file atomically: a reader finds the old file or the new one, never a part.

        Raises:
            OutputError: the file cannot be written (a full disk). An older file stays as it was.
        """
        path = Path(path)
        part = path.with_suffix(".part")
        try:
            part.write_text(json.dumps({"version": VERSION} | asdict(self), ensure_ascii=False), "utf-8")
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise OutputError(f"cannot write {path}: {error.strerror or error}; the predictions are kept") from error

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a file of :meth:`save`; raise :class:`Refusal` if it is another file."""
        path = Path(path)
        try:
            data = json.loads(path.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise Refusal(f"{path} is not a results file of Tokensieve: not JSON") from None
        except OSError as error:
            raise Refusal(f"{path} cannot be read ({error.strerror or error})") from None
        if not isinstance(data, dict) or "version" not in data:
            raise Refusal(f"{path} is not a results file of Tokensieve")
        if (version := data.pop("version")) != VERSION:
            raise Refusal(
                f"{path} was written by another version of Tokensieve: its format is {version}, and {VERSION} is read; "
                "the same comparison into the same folder writes it anew"
            )
        return cls(
            **{
                **data,
                "rows": tuple(map(_row, data["rows"])),
                "questions": tuple(Question(**question) for question in data["questions"]),
                "scores": tuple(tuple(map(tuple, seeds)) for seeds in data["scores"]),
                "skipped": tuple(Skipped(**sample) for sample in data["skipped"]),
                "examples": tuple(map(_example, data["examples"])),
            }
        )


def _label(row: Row) -> str:
    return row.method if row.keep is None else f"{row.method} at {row.keep}"


def _row(data: Mapping[str, Any]) -> Row:
    random = data["random"] and VsRandom(**data["random"])
    return Row(**{**data, "random": random, "types": tuple(TypeScore(**score) for score in data["types"])})


def _example(data: Mapping[str, Any]) -> Example:
    return Example(**{**data, "answers": tuple(data["answers"]), "kept": tuple(data["kept"])})
