"""JSONL, CSV and parquet files as rows of named values, each with its place in the file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokensieve.errors import DataError, MissingExtra

Record = tuple[str, dict[str, Any]]
"""Where the row stands ("data.jsonl, line 3") and its values."""


def read_records(path: Path) -> Iterator[Record]:
    """The rows of a file, by its ending.

    Raises:
        DataError: no such file, an unknown ending, or a row that cannot be read.
        ImportError: for parquet without the ``data`` extra.
    """
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: a data set is 'reference' or a file ending in {', '.join(readers)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: a JSON object is expected, like {{'image': …, 'question': …, 'answer': …}}")
            yield where, row


def _csv(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: {_cells(row)} cells, but the header has {len(rows.fieldnames or ())}")
                yield where, row
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.reader.line_num}: not valid CSV ({error})") from None


def _cells(row: dict[Any, Any]) -> int:
    return sum(value is not None for key, value in row.items() if key is not None) + len(row.get(None) or ())


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtra('reading parquet needs pyarrow: pip install "tokensieve[data]"') from error
    try:
        for number, row in enumerate(parquet.read_table(path).to_pylist(), 1):
            yield f"{path}, row {number}", row
    except ArrowException as error:
        raise DataError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
