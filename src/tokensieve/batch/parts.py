"""The output folder: ``answers`` holds one file for each part of the input, written at once or not at all.

A part's file has its number in its name and is put there by a rename. A part that is answered twice, because a node was
lost or a driver was killed, replaces its file by one with the same rows: no row can be missing or occur twice.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tokensieve.batch.source import Part
from tokensieve.errors import MissingExtra, OutputError, ResumeError

Format: TypeAlias = Literal["jsonl", "parquet"]
SETUP, ANSWERS = "batch.json", "answers"


@dataclass(frozen=True)
class AnswerRow:
    """One line of the output: the answer to one row by one method.

    Attributes:
        id: the row's own id, or its source.
        source: file and line (or row) of the input, unique: "shard-3.jsonl:17".
        method: full spec, with budget and seed.
        answer: ``None`` if there is an error.
        tokens_before, tokens_after: visual tokens of the row's images. ``tokens_before`` is ``None`` where the engine
            does not give it.
        tokens_average: visual tokens averaged over the layers of the LLM.
        error: the reason why there is no answer, one line.
        type, answers, choices, images: of the input row, if it has right answers. Equal images have equal names.
    """

    id: str
    source: str
    method: str
    answer: str | None = None
    tokens_before: int | None = None
    tokens_after: int | None = None
    tokens_average: float | None = None
    error: str | None = None
    type: str | None = None
    answers: tuple[str, ...] | None = None
    choices: tuple[str, ...] | None = None
    images: tuple[str, ...] | None = None


@dataclass
class Totals:
    """Counts over finished parts.

    Attributes:
        rows: input rows.
        answers: answers, over all methods.
        errors: input rows that some method has no answer to.
        tokens_before, tokens_after: sums over the answers whose engine gives both.
    """

    rows: int = 0
    answers: int = 0
    errors: int = 0
    tokens_before: int = 0
    tokens_after: int = 0

    def add(self, rows: Sequence[AnswerRow]) -> None:
        """Count the rows of one part."""
        self.rows += len({row.source for row in rows})
        self.errors += len({row.source for row in rows if row.error is not None})
        self.answers += sum(row.error is None for row in rows)
        for row in rows:
            if row.tokens_before is not None and row.tokens_after is not None:
                self.tokens_before += row.tokens_before
                self.tokens_after += row.tokens_after

    @property
    def saved(self) -> float:
        """Share of the visual tokens that were dropped."""
        return 1 - self.tokens_after / self.tokens_before if self.tokens_before else 0.0


class Output:
    """The folder of one batch.

    Args:
        folder: created if it is missing.
        file_format: of the parts.
        setup: all that a call that goes on must have in common with the first one.

    Raises:
        ResumeError: the folder holds a batch of another command, or other files of this kind.
        OutputError: the folder cannot be used.
    """

    def __init__(self, folder: Path, file_format: Format, setup: dict[str, Any]) -> None:
        self.folder, self.file_format = folder, file_format
        try:
            (folder / ANSWERS).mkdir(parents=True, exist_ok=True)
            recorded = (folder / SETUP).read_text("utf-8") if (folder / SETUP).exists() else None
            for stale in folder.glob("**/.*.tmp"):  # of a driver that was killed while it wrote
                stale.unlink()
            existing = next((folder / ANSWERS).iterdir(), None)
        except OSError as error:
            raise OutputError(f"cannot use the output folder {folder}: {error.strerror or error}") from error
        if recorded is not None:
            self._check(recorded, setup)
        elif existing is not None:
            raise ResumeError(f"{existing} is there, and no {SETUP} of its command; choose another output folder")
        else:
            self._put(folder / SETUP, json.dumps(setup, indent=1, ensure_ascii=False).encode())

    def path(self, part: Part) -> Path:
        """Return the file of a part."""
        return self.folder / ANSWERS / f"part-{part.number:06d}.{self.file_format}"

    def finished(self, parts: Sequence[Part]) -> set[int]:
        """Return the numbers of the parts whose file is there."""
        names = {entry.name for entry in os.scandir(self.folder / ANSWERS)}
        return {part.number for part in parts if self.path(part).name in names}

    def write(self, part: Part, rows: Sequence[AnswerRow]) -> None:
        """Write a part's file.

        Raises:
            OutputError: the disk is full, for example. No incomplete file is left.
        """
        self._put(self.path(part), _encoded(rows, self.file_format))

    def write_json(self, name: str, data: Any) -> None:
        """Write another file of the folder."""
        self._put(self.folder / name, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())

    def read(self, part: Part) -> list[AnswerRow]:
        """Return the rows of a finished part.

        Raises:
            ResumeError: the file was changed.
        """
        path = self.path(part)
        try:
            return _decoded(path, self.file_format)
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{path} cannot be read; delete it, and the same command writes it again") from error

    def read_all(self, parts: Sequence[Part]) -> Iterator[AnswerRow]:
        """Yield the rows of all parts."""
        for part in parts:
            yield from self.read(part)

    def _put(self, path: Path, content: bytes) -> None:
        """Write a file beside its place, then rename it: its name never stands for half of it."""
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a rename may reach the disk before the content
            temporary.replace(path)
        except BaseException as error:  # Ctrl-C and SIGTERM, too
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            raise OutputError(
                f"cannot write {path}: {error.strerror or error}; all parts written before are whole, "
                "and the same command continues from them"
            ) from error

    def _check(self, recorded: str, setup: dict[str, Any]) -> None:
        try:
            facts = dict(json.loads(recorded))
        except (ValueError, TypeError):
            raise ResumeError(f"{self.folder / SETUP} is not of this command; choose another output folder") from None
        changed = sorted(key for key in facts.keys() | setup.keys() if facts.get(key) != setup.get(key))
        if changed:
            raise ResumeError(
                f"{self.folder} holds answers of another command ({', '.join(changed)} differ); choose another output "
                "folder, or delete it to start anew"
            )


def check_rows(part: Part, rows: Sequence[AnswerRow], methods: int) -> None:
    """Raise ``RuntimeError`` unless each row of a part occurs once for each method."""
    counts = Counter(row.source for row in rows)
    if len(counts) != part.rows or set(counts.values()) != {methods}:
        raise RuntimeError(f"part {part.number}: {len(counts)} of {part.rows} rows, by {methods} methods: {counts}")


def _encoded(rows: Sequence[AnswerRow], file_format: Format) -> bytes:
    if file_format == "jsonl":
        return "".join(json.dumps(_line(row), ensure_ascii=False) + "\n" for row in rows).encode()
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra("writing parquet needs pyarrow", "batch") from error
    texts = pa.list_(pa.string())
    kinds = {"tokens_before": pa.int64(), "tokens_after": pa.int64(), "tokens_average": pa.float64()}
    kinds |= {"answers": texts, "choices": texts, "images": texts}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in AnswerRow.__dataclass_fields__])
    sink = BytesIO()
    parquet.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema), sink)
    return sink.getvalue()


def _line(row: AnswerRow) -> dict[str, Any]:
    """Return a row as JSON, without the columns of right answers if it has none."""
    values = asdict(row)
    optional = ("type", "answers", "choices", "images")
    return {name: value for name, value in values.items() if value is not None or name not in optional}


def _decoded(path: Path, file_format: Format) -> list[AnswerRow]:
    if file_format == "jsonl":
        lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    else:
        from pyarrow import parquet

        lines = parquet.read_table(path).to_pylist()
    return [AnswerRow(**{name: _as_tuple(value) for name, value in line.items()}) for line in lines]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
