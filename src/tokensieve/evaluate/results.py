"""Results of a comparison: its rows, its questions with their scores, and its files. They are read without a model."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from tokensieve.budget import Budget
from tokensieve.errors import MissingExtra, OutputError, Refusal
from tokensieve.evaluate.intervals import Clusters, PairedDifference, Scores, paired_difference
from tokensieve.evaluate.rows import Row, VsRandom, YesNo, label

VERSION = 3
RESULTS = "results.json"
NAMED = 10  # skipped questions that the note names
Table: TypeAlias = Literal["rows", "types", "questions"]
"""One line per row of the table; per row and question type; or per row, seed and question."""


@dataclass(frozen=True)
class Question:
    """One question of the data.

    Attributes:
        type: kind of question; "" when the data has none.
        cluster: number of its image, in order of appearance. Questions about one image are not independent; questions
            with an image in common share a number.
        positive: for the metric ``yes_no``, whether the accepted answer is yes.
    """

    id: str
    type: str
    cluster: int
    positive: bool | None = None


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

    def row(self, method: str, keep: Budget | None = None) -> Row:
        """Return the row of a method at a budget; without ``keep``, its first row.

        Raises:
            Refusal: there is no such row.
        """
        for row in self.rows:
            if row.method == method and keep in (None, row.keep):
                return row
        names = ", ".join(row.label for row in self.rows)
        raise Refusal(f"no row {label(method, keep)!r}; the rows are {names}")

    def __repr__(self) -> str:
        images = len({question.cluster for question in self.questions})
        missing = "" if self.complete else ", not complete"
        size = f"{len(self.rows)} rows, {len(self.questions)} questions, {images} images{missing}"
        return "\n  ".join([f"Results({size}):", *map(repr, self.rows)])

    def paired(self, row: Row, other: Row, type: str | None = None) -> PairedDifference:
        """Return the mean score of a row minus that of another, paired by question.

        Args:
            row, other: two of :attr:`rows`.
            type: compare on the questions of this type only.

        Raises:
            Refusal: no question of this type.
        """
        chosen, clusters = self._chosen(type)
        return paired_difference(self._scores(row)[:, chosen], self._scores(other)[:, chosen], clusters)

    def yes_no(self, row: Row, type: str | None = None) -> YesNo:
        """Return F1 and its parts for a row, all questions or those of one type.

        Raises:
            Refusal: another metric than ``yes_no``, or no question of this type.
        """
        chosen, clusters = self._chosen(type)
        positive = [self.questions[i].positive for i in chosen]
        if None in positive:
            raise Refusal(f"F1 is for the metric yes_no; this comparison has {self.settings.get('metric')}")
        return YesNo.of(self._scores(row)[:, chosen], np.array(positive, dtype=bool), clusters)

    def _chosen(self, type: str | None) -> tuple[list[int], Clusters]:
        """Return the numbers of the questions of a type, and the numbers of their images."""
        chosen = [i for i, question in enumerate(self.questions) if type in (None, question.type)]
        if not chosen:
            types = dict.fromkeys(question.type for question in self.questions)
            raise Refusal(f"no question of type {type!r}; the types are {', '.join(map(repr, types))}")
        return chosen, np.array([self.questions[i].cluster for i in chosen])

    def _scores(self, row: Row) -> Scores:
        if row not in self.rows:
            raise Refusal(f"{row.label} is not a row of these results")
        return np.array(self.scores[self.rows.index(row)])

    def records(self, table: Table = "rows") -> list[dict[str, Any]]:
        """Return one of the three tables as flat records with equal keys.

        Args:
            table: "rows"; "types": accuracy by question type; "questions": the score of each question in each run.
        """
        if table not in get_args(Table):
            raise Refusal(f"the tables are {', '.join(get_args(Table))}; got {table!r}")
        return list({"rows": self._row_records, "types": self._type_records, "questions": self._scored}[table]())

    def _row_records(self) -> Iterator[dict[str, Any]]:
        """Yield the fields of the rows; those of a nested object are prefixed, and left out if no row has it."""
        nested = {"random": VsRandom, "yes_no": YesNo}
        columns = {
            name: [field.name for field in fields(kind)]
            for name, kind in nested.items()
            if any(getattr(row, name) is not None for row in self.rows)
        }
        plain = [field.name for field in fields(Row) if field.name not in (*nested, "types", "referee")]
        for row in self.rows:
            record = {name: getattr(row, name) for name in plain}
            for name, inner in columns.items():
                record |= {f"{name}_{part}": getattr(getattr(row, name), part, None) for part in inner}
            yield record

    def _type_records(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            for score in row.types:
                yield {"method": row.method, "keep": row.keep, **asdict(score)}

    def _scored(self) -> Iterator[dict[str, Any]]:
        for row, seeds in zip(self.rows, self.scores, strict=True):
            for seed, scores in enumerate(seeds):
                for question, score in zip(self.questions, scores, strict=True):
                    place = {"id": question.id, "type": question.type, "image": question.cluster}
                    yield {"method": row.method, "keep": row.keep, "seed": seed, **place, "score": score}

    def to_pandas(self, table: Table = "rows") -> Any:
        """Return one of the tables of :meth:`records` as a ``pandas.DataFrame``.

        Raises:
            MissingExtra: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise MissingExtra("to_pandas() needs pandas", "data") from None
        return DataFrame(self.records(table))

    def to_csv(self, path: str | Path, table: Table = "rows") -> None:
        """Write one of the tables of :meth:`records` as CSV; ``None`` is an empty cell.

        Raises:
            OutputError: the file cannot be written.
        """
        records = self.records(table)
        try:
            with Path(path).open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(records[0]) if records else [])
                writer.writeheader()
                writer.writerows(records)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error

    def plot(self, cost: str = "tokens_average") -> Any:
        """Return a ``matplotlib`` figure of accuracy, with its intervals, against a field of the rows.

        Args:
            cost: a numeric field, such as "tokens_average" or "flops_ratio". Rows without it are left out.

        Raises:
            Refusal: no row has this field.
            MissingExtra: matplotlib is not installed.
        """
        points = [row for row in self.rows if isinstance(getattr(row, cost, None), int | float)]
        if not points:
            raise Refusal(f"no row has a number {cost!r} to plot against")
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingExtra("plot() needs matplotlib", "report") from None
        figure = Figure(layout="constrained")
        axes = figure.add_subplot(xlabel=cost, ylabel="accuracy, %")
        for method in dict.fromkeys(row.method for row in points):
            rows = sorted((row for row in points if row.method == method), key=lambda row: getattr(row, cost))
            x, y = [getattr(row, cost) for row in rows], [100 * row.accuracy for row in rows]
            below = [100 * (row.accuracy - row.accuracy_low) for row in rows]
            above = [100 * (row.accuracy_high - row.accuracy) for row in rows]
            axes.errorbar(x, y, [below, above], label=method, marker="o", capsize=2)
        axes.legend()
        return figure

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
                "rows": tuple(map(Row.from_json, data["rows"])),
                "questions": tuple(Question(**question) for question in data["questions"]),
                "scores": tuple(tuple(map(tuple, seeds)) for seeds in data["scores"]),
                "skipped": tuple(Skipped(**sample) for sample in data["skipped"]),
                "examples": tuple(map(_example, data["examples"])),
            }
        )


def _example(data: Mapping[str, Any]) -> Example:
    return Example(**{**data, "answers": tuple(data["answers"]), "kept": tuple(data["kept"])})


def skipped_note(results: Results) -> str:
    """Return one line that names the first questions that were skipped, and the reason of the first."""
    skipped, numbers = results.skipped, dict[str, list[str]]()
    for entry in skipped[:NAMED]:
        place, _, number = entry.where.rpartition(" ")  # "data.jsonl, line" and "7"
        numbers.setdefault(place or "question", []).append(number or entry.id)
    places = [f"{place}{'s' * (len(listed) > 1)} {', '.join(listed)}" for place, listed in numbers.items()]
    more = [f"{len(skipped) - NAMED} more in {RESULTS}"] if len(skipped) > NAMED else []
    text, total = "; ".join([*places, *more]), len(skipped) + len(results.questions)
    return f"{len(skipped)} of {total} questions skipped: images cannot be read ({text}: {skipped[0].reason})"
