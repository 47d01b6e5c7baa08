"""The input in parts: files, globs and folders of shards, each cut into ranges of rows that are read alone.

Only the places of the parts are held in memory. A part's rows are read by the worker that answers them.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any

from tokensieve.errors import DataError, MissingExtra, Refusal, first_line
from tokensieve.evaluate.data import Sample, sample_of
from tokensieve.evaluate.pictures import Picture, StoredImage
from tokensieve.evaluate.records import Record, check_utf8, line_record, read_records

REFERENCE = "reference"
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that a row is read from."""

    image: str = "image"
    question: str = "question"
    answer: str = "answer"


@dataclass(frozen=True)
class Part:
    """A range of rows of one file.

    Attributes:
        number: of the part among all parts of the input, from 0.
        path: absolute path of the file; "reference" for the bundled benchmark.
        name: the file relative to the input folder; it begins the source of each row.
        first: number of its first line (JSONL) or row, from 1.
        rows: number of its rows; empty lines of JSONL are none.
        offset: byte at which its first line begins, in JSONL.
    """

    number: int
    path: str
    name: str
    first: int
    rows: int
    offset: int = 0


@dataclass(frozen=True)
class Row:
    """One row of a part, read or not.

    Attributes:
        source: file and line (or row), unique in the input: "shard-3.jsonl:17".
        id: the row's own id, or its source.
        sample: the question; its id is the source. ``None`` if the row cannot be read.
        error: the reason, one line.
        images: for each image, a text that only equal images share.
    """

    source: str
    id: str
    sample: Sample | None = None
    error: str | None = None
    images: tuple[str, ...] = ()


def files_of(data: str) -> list[tuple[str, Path]]:
    """Return (name, absolute path) of each file that ``--data`` names, in the order of the names.

    Raises:
        DataError: there is no file, or one of another kind.
    """
    path = Path(os.path.expanduser(data))
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in ENDINGS and f.is_file())
        if not files:
            raise DataError(f"{data}: no shards in this folder; they end in {', '.join(ENDINGS)}")
        return [(file.relative_to(path).as_posix(), file.resolve()) for file in files]
    matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True)) if not path.is_file() else [path]
    files = [file for file in matches if file.is_file()]
    if not files:
        raise DataError(
            f"{data}: no such file; the data are a file, a folder of shards, or a pattern such as 'a/*.jsonl'"
        )
    for file in files:
        if file.suffix.lower() not in ENDINGS:
            raise DataError(f"{file}: a file of rows ends in {', '.join(ENDINGS)}")
    root = Path(os.path.commonpath([file.resolve().parent for file in files]))
    return [(file.resolve().relative_to(root).as_posix(), file.resolve()) for file in files]


def parts_of(data: str, rows_per_part: int) -> list[Part]:
    """Cut the input into parts of at most ``rows_per_part`` rows. The same files give the same parts.

    Raises:
        DataError: a file that cannot be read, or no rows at all.
    """
    if data == REFERENCE:
        sizes = _ranges(len(_reference()), rows_per_part)
        return [Part(n, REFERENCE, REFERENCE, first, rows) for n, (first, rows, _) in enumerate(sizes)]
    numbers, parts = count(), []
    for name, path in files_of(data):
        try:
            for first, rows, offset in _cut(path, rows_per_part):
                parts.append(Part(next(numbers), str(path), name, first, rows, offset))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not parts:
        raise DataError(f"{data}: no rows")
    return parts


def fingerprint(data: str) -> list[list[Any]]:
    """Return name, size and time of change of each file: an interrupted run goes on with the same files only."""
    if data == REFERENCE:
        return [[REFERENCE]]
    return [[name, path.stat().st_size, path.stat().st_mtime_ns] for name, path in files_of(data)]


def read_part(part: Part, columns: Columns, *, fetch_images: bool) -> list[Row]:
    """Return the rows of a part, in order; a row that cannot be read has its error instead of a question.

    Raises:
        DataError: the whole file cannot be read.
    """
    if part.path == REFERENCE:
        return list(_reference()[part.first - 1 : part.first - 1 + part.rows])
    names, pictures = (columns.image, columns.question, columns.answer), dict[str, Picture]()
    path, rows = Path(part.path), []
    for number, record in _records(part, names):
        source = f"{part.name}:{number}"
        if isinstance(record, Refusal):
            rows.append(Row(source, source, error=_one_line(record, path)))
            continue
        try:
            sample = sample_of(record, source, names, pictures, fetch_images=fetch_images, answered=False)
        except Refusal as error:
            given = record.values.get("id")
            name = str(given) if isinstance(given, str | int) and str(given).strip() else source
            rows.append(Row(source, name, error=_one_line(error, path)))
        else:
            images = tuple(_image_name(picture, part) for picture in sample.images)
            # an id may be used twice in the data, a source cannot
            rows.append(Row(source, sample.id, replace(sample, id=source), images=images))
    return rows


def _one_line(error: Refusal, path: Path) -> str:
    """Return an error without the folder of the machine, which differs between nodes."""
    return " ".join(str(error).split()).replace(f"{path.parent}{os.sep}", "")


def _image_name(picture: Picture, part: Part) -> str:
    if isinstance(picture, Path):  # relative to the input folder: shards in two folders may use one name
        in_folder = os.path.relpath(picture, Path(part.path).parent)
        return os.path.normpath(os.path.join(os.path.dirname(part.name), in_folder))
    return picture.digest if isinstance(picture, StoredImage) else str(getattr(picture, "url", picture))


# -- cutting ---------------------------------------------------------------------------------------------------------


def _cut(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first line or row, rows, offset) of each part of a file."""
    ending = path.suffix.lower()
    if ending == ".jsonl":
        yield from _cut_lines(path, size)
    elif ending == ".parquet":
        first = 1
        with _parquet(path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        for group_rows in sizes:  # a part lies in one row group, so that its worker reads no other
            yield from ((first + start - 1, rows, 0) for start, rows, _ in _ranges(group_rows, size))
            first += group_rows
    else:
        yield from _ranges(len(_whole(str(path), path.stat().st_mtime_ns)), size)


def _ranges(rows: int, size: int) -> list[tuple[int, int, int]]:
    return [(start + 1, min(size, rows - start), 0) for start in range(0, rows, size)]


def _cut_lines(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    check_utf8(path)
    with path.open("rb") as file:
        first, start, offset, rows, number = 1, 0, 0, 0, 0
        for number, line in enumerate(file, 1):
            offset += len(line)
            rows += bool(line.strip())
            if rows == size:
                yield first, rows, start
                first, start, rows = number + 1, offset, 0
        if rows:
            yield first, rows, start


# -- reading ---------------------------------------------------------------------------------------------------------


def _records(part: Part, names: Sequence[str]) -> Iterator[tuple[int, Record | Refusal]]:
    """Yield (line or row number, record or the reason why there is none)."""
    path = Path(part.path)
    if path.suffix.lower() == ".jsonl":
        yield from _lines(part, path)
    elif path.suffix.lower() == ".parquet":
        yield from _table_rows(part, path, names)
    else:
        records = _whole(part.path, path.stat().st_mtime_ns)[part.first - 1 : part.first - 1 + part.rows]
        yield from enumerate(records, part.first)


def _lines(part: Part, path: Path) -> Iterator[tuple[int, Record | Refusal]]:
    remaining = part.rows
    with path.open("rb") as file:
        file.seek(part.offset)
        for number in count(part.first):
            if not remaining:
                return
            line = file.readline()
            if not line:
                raise DataError(f"{path}: the file has become shorter while it was read")
            if not line.strip():
                continue
            remaining -= 1
            try:
                yield number, line_record(path, number, line)
            except Refusal as error:
                yield number, error


def _table_rows(part: Part, path: Path, names: Sequence[str]) -> Iterator[tuple[int, Record | Refusal]]:
    start = 0
    with _parquet(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        stored = file.schema_arrow.names
    for group, rows in enumerate(sizes):  # noqa: B007 (the group is used below)
        if start + rows >= part.first:
            break
        start += rows
    wanted_columns = tuple(c for c in stored if c in {*names, "id", "type", "choices", "conversations"})
    table = _row_group(part.path, path.stat().st_mtime_ns, group, wanted_columns)

    def values(number: int) -> dict[str, Any]:
        row: dict[str, Any] = table.slice(number - 1 - start, 1).to_pylist()[0]
        # the error of a missing column names those that there are
        return row if all(name in stored for name in names[:2]) else dict.fromkeys(stored) | row

    for number in range(part.first, part.first + part.rows):
        try:
            record = Record(f"{path}, row {number}", values(number), path.parent, partial(values, number))
        except UnicodeDecodeError as error:
            yield number, DataError(f"not UTF-8 text (byte {error.object[error.start]:#04x})")
        else:
            yield number, record


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtra("reading parquet needs pyarrow", "batch") from error
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a parquet file ({first_line(error)})") from None


@lru_cache(1)  # the parts of one row group follow each other
def _row_group(path: str, changed: int, group: int, columns: tuple[str, ...]) -> Any:
    with _parquet(Path(path)) as file:
        return file.read_row_group(group, columns=list(columns))


@lru_cache(1)
def _whole(path: str, changed: int) -> list[Record]:
    """Return all rows of a file that cannot be read in parts (JSON, CSV, TSV)."""
    return list(read_records(path))


@lru_cache(1)
def _reference() -> tuple[Row, ...]:
    """Return the bundled benchmark. Questions about one scene name the same image."""
    from tokensieve.evaluate.data import load_data

    samples = load_data(REFERENCE)
    numbers = {image: n for n, image in enumerate(dict.fromkeys(image for s in samples for image in s.images))}
    return tuple(Row(s.id, s.id, s, images=tuple(f"scene {numbers[image]}" for image in s.images)) for s in samples)
