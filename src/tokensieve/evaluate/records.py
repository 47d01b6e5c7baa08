"""Rows of named values: files by their ending, and the data sets of the datasets library."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokensieve.errors import DataError, MissingExtra, first_line

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
UTF16 = (b"\xff\xfe", b"\xfe\xff")
LARGEST_CELL = 2**27  # of a CSV file, in characters: an image in base64 is far longer than csv's own limit


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        where: its place, as "data.jsonl, line 3".
        values: by column.
        folder: folder that file names in the row are relative to.
        again: reads the values once more; a table's images are read so, instead of being kept in memory.
    """

    where: str
    values: dict[str, Any]
    folder: Path
    again: Callable[[], dict[str, Any]]


def read_records(source: str | Path, split: str | None = None) -> Iterator[Record]:
    """Yield the rows of a data set.

    Args:
        source: a file, read by its ending; a folder of the datasets library; or a data set's name on the hub.
        split: a split of a folder or of a data set of the hub.

    Raises:
        DataError: there is no such data, or a row cannot be read.
        MissingExtra: the ``data`` extra is needed.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
    path = Path(os.path.expanduser(source))
    reader = readers.get(path.suffix.lower())
    if path.is_dir() or (reader is None and not path.exists() and HUB_NAME.fullmatch(str(source))):
        yield from _datasets(source, split)
        return
    if reader is None:
        endings = ", ".join(readers)
        raise DataError(f"{path}: a data set is 'reference', a file ending in {endings}, or a folder of datasets")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if split is not None:
        raise DataError(f"{path}: a file has no splits; got split {split!r}")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _row(path: Path, where: str, values: dict[str, Any]) -> Record:
    return Record(where, values, path.parent, lambda: values)


# -- text ------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, with or without a byte-order mark."""
    check_utf8(path)
    # bytes that are not UTF-8 become lone surrogates: unlike a decoding error, they are found in their line
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number, line in enumerate(file, 1):
            _check_line(line, f"{path}, line {number}")
            yield line


def check_utf8(path: Path) -> None:
    """Refuse a file of UTF-16 text."""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(UTF16) or (len(start) > 1 and b"\0" in start[:2]):
        raise DataError(f"{path}: this is UTF-16 text; save it as UTF-8")


def _check_line(line: str, where: str) -> None:
    if wrong := re.search("[\udc80-\udcff]", line):
        byte = ord(wrong[0]) - 0xDC00
        raise DataError(f"{where}: not UTF-8 text (byte 0x{byte:02x} at column {wrong.start() + 1})")


def line_record(path: Path, number: int, line: bytes) -> Record:
    """Return the row in one line of a JSONL file; raise :class:`DataError` if the line is no JSON object."""
    where = f"{path}, line {number}"
    text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
    _check_line(text, where)
    return _row(path, where, _object(_parsed(text, where), where))


def _parsed(text: str, where: str, part: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if part else f"column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({error.msg} at {place})") from None
    except RecursionError:
        raise DataError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError:  # Python reads no longer numbers
        raise DataError(f"{where}: a number has more than {sys.get_int_max_str_digits()} digits") from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, like {{'image': …, 'question': …, 'answer': …}}")
    return row


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        if line.strip():
            yield _row(path, where, _object(_parsed(line, where), where))


def _json(path: Path) -> Iterator[Record]:
    rows = _parsed("".join(_lines(path)), str(path), part="file")
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise DataError(f"{path}: a list of objects is expected, or {{'data': [the list]}}; one a line is .jsonl")
    for number, row in enumerate(rows, 1):
        where = f"{path}, item {number}"
        yield _row(path, where, _object(row, where))


def _tsv(path: Path) -> Iterator[Record]:
    return _csv(path, delimiter="\t")


def _csv(path: Path, delimiter: str = ",") -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_CELL))
    rows = csv.DictReader(_lines(path), strict=True, delimiter=delimiter)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where}: {_cells(row)} cells, but the header has {len(rows.fieldnames or ())}")
            yield _row(path, where, row)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.reader.line_num}: not valid CSV ({error})") from None


def _cells(row: dict[Any, Any]) -> int:
    return sum(value is not None for key, value in row.items() if key is not None) + len(row.get(None) or ())


# -- tables ----------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtra("reading parquet needs pyarrow", "data") from error
    try:
        file = parquet.ParquetFile(path)
    except (ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a parquet file ({first_line(error)})") from None
    # images are large: only the part of the file that was read last stays in memory
    part = lru_cache(maxsize=1)(file.read_row_group)
    counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    starts = list(accumulate(counts, initial=0))

    def row(number: int) -> dict[str, Any]:
        group = bisect_right(starts, number) - 1
        values: dict[str, Any] = part(group).slice(number - starts[group], 1).to_pylist()[0]
        return values

    yield from _table(str(path), path.parent, starts[-1], row)


def _table(name: str, folder: Path, count: int, read: Callable[[int], dict[str, Any]]) -> Iterator[Record]:
    for number in range(count):
        where = f"{name}, row {number + 1}"
        try:
            values = read(number)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 text (byte {error.object[error.start]:#04x})") from None
        yield Record(where, values, folder, lambda number=number: read(number))  # type: ignore[misc]


def _datasets(source: str | Path, split: str | None) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("reading a folder or a name needs datasets", "data") from error
    path, name = Path(os.path.expanduser(source)), str(source)
    on_disk = any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
    if not path.is_dir() and not datasets.config.HF_HUB_OFFLINE:
        _check_hub(name)
    try:
        data = datasets.load_from_disk(str(path)) if on_disk else datasets.load_dataset(str(path))
    except Exception as error:  # many types from several libraries
        raise DataError(f"the data set {name} does not load: {first_line(error)}") from error
    if isinstance(data, datasets.DatasetDict):
        if split is None and len(data) == 1:
            split = next(iter(data))
        if split not in data:
            given = "choose one with --split, in a training as NAME:SPLIT" if split is None else f"got {split!r}"
            raise DataError(f"{source}: the splits are {', '.join(data)}; {given}")
        name, data = f"{source}, {split}", data[split]
    elif split is not None and split != data.split:
        splits = f"the only split is {data.split}" if data.split else "this is one table without splits"
        raise DataError(f"{source}: {splits}; got {split!r}")
    # the stored values: decoding an image here would read its pixels, and lose the name of its file
    stored = data.with_format("arrow")
    classes = {column: kind.names for column, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)}

    def read(number: int) -> dict[str, Any]:
        row: dict[str, Any] = stored[number : number + 1].to_pylist()[0]
        for column, names in classes.items():
            if row[column] is not None and row[column] >= 0:
                row[column] = names[row[column]]
        return row

    yield from _table(name, path, len(stored), read)


def _check_hub(name: str) -> None:
    """Refuse a name that the hub does not give, after one quick request: loading would retry for half a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=10)
    except Exception as error:  # no network, no such data set, no permission: many types from several libraries
        raise DataError(
            f"no data set {name}: it is no folder, and the hub does not give it ({first_line(error)}); "
            "HF_HUB_OFFLINE=1 takes a copy from the local cache"
        ) from error
