"""Results of a comparison: the rows of the table and the data of the report. They can be read without a model."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokensieve.errors import OutputError, Refusal

VERSION = 2
FULL, ORACLE = "full", "oracle"  # names of the two rows that are not a method's: the unhooked model and the headroom


@dataclass(frozen=True)
class Row:
    """One method at one budget; the fields and their order are those of ``compare --json``.

    Attributes:
        method: the spec as the user wrote it. "full" is the unhooked model. "oracle" is the headroom, which keeps the
            tokens of the asked object first (data with boxes only).
        keep: the budget; ``None`` for full and for methods without one. Under ``keep_means="average"`` it is the
            requested average for methods inside the LLM.
        tokens_before, tokens_after: visual tokens per image, mean over the samples.
        tokens_average: tokens per image averaged over the LLM's layers (equal to tokens_after for methods that act
            before the LLM).
        samples: questions.
        accuracy, accuracy_low, accuracy_high: share in 0 … 1 with its 95 % interval: Wilson for one run scored 0 or 1,
            bootstrap over questions (and seeds, for a method run with several) otherwise.
        flops_ratio: prefill FLOPs / those of full. This field and the following are ``None`` without a measurement.
        prefill_ms, prefill_speedup, method_ms, decode_ms_per_token, decode_speedup: medians for one prompt, from rounds
            that all rows share, with their quartiles ``…_low`` and ``…_high``; see :class:`tokensieve.measure.Cost`.
            A row's prefill_ms times its prefill_speedup is the prefill_ms of full; the same holds for decoding.
        peak_activation_mb, kv_mb: MB (10^6 bytes) for one prompt's prefill.
        break_even: "at once", "after" so many tokens, "never" or "not told apart"; ``None`` for full and for models
            that do not generate.
        break_even_tokens, break_even_low, break_even_high: generated tokens after which the method has paid for
            itself; ``None`` for no finite number.
        timing_note: the reason why the times are uncertain, such as a busy machine.
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

    def to_json(self) -> dict[str, Any]:
        """Return the pinned fields, in order."""
        return asdict(self)


@dataclass(frozen=True)
class TypeScore:
    """Accuracy on the questions of one type, with its 95 % interval."""

    type: str
    samples: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class VsRandom:
    """A row compared with random selection, paired by question.

    Attributes:
        tokens: average of random's tokens over the layers, at most a fifth more or fewer than the row's.
        accuracy: of random.
        difference, low, high: the row's accuracy minus random's, with its 95 % bootstrap interval.
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
        types: for each row, its accuracy by question type (empty when the data has no types).
        differences: for each row, (difference, low, high): accuracy minus full's, paired by question, with its 95 %
            bootstrap interval.
        chances: for each row, its comparison with random; ``None`` for full and random themselves, and where random
            was not run with a similar number of tokens.
        examples: the same images for every row.
    """

    complete: bool
    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    types: tuple[tuple[TypeScore, ...], ...]
    differences: tuple[tuple[float, float, float], ...]
    chances: tuple[VsRandom | None, ...]
    examples: tuple[Example, ...]

    def save(self, path: Path) -> None:
        """Write the file atomically: a reader finds the old file or the new one, never a part.

        Raises:
            OutputError: the file cannot be written (a full disk). An older file stays as it was.
        """
        part = path.with_suffix(".part")
        try:
            part.write_text(json.dumps({"version": VERSION} | asdict(self), ensure_ascii=False), "utf-8")
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise OutputError(f"cannot write {path}: {error.strerror or error}; the predictions are kept") from error

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file of :meth:`save`; raise :class:`Refusal` if it is another file."""
        try:
            data = json.loads(path.read_text("utf-8"))
            if data.pop("version") != VERSION:
                raise Refusal(f"{path} was written by another version of Tokensieve")
            rows = tuple(Row(**row) for row in data.pop("rows"))
            types = tuple(tuple(TypeScore(**score) for score in scores) for scores in data.pop("types"))
            examples = tuple(_example(example) for example in data.pop("examples"))
            differences = tuple((d[0], d[1], d[2]) for d in data.pop("differences"))
            chances = tuple(chance and VsRandom(**chance) for chance in data.pop("chances"))
            return cls(rows=rows, types=types, differences=differences, chances=chances, examples=examples, **data)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise Refusal(f"{path} is not a results file of Tokensieve") from error


def _example(data: dict[str, Any]) -> Example:
    return Example(**{**data, "answers": tuple(data["answers"]), "kept": tuple(data["kept"])})
