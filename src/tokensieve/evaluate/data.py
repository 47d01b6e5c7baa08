"""Questions about images, from the bundled benchmark or from a JSONL, CSV or parquet file."""

from __future__ import annotations

import csv
import difflib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from tokensieve.errors import DataError, MissingExtra
from tokensieve.evaluate.images import check_image, decode_image, open_image

Box = tuple[float, float, float, float]
Record = tuple[str, dict[str, Any]]
"""Place of the row ("data.jsonl, line 3") and its values."""


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        id: unique in its data set.
        image: a file, or a function that returns the image; opened by :meth:`open` only. Samples about the same image
            have equal values here.
        question: never empty.
        answers: accepted answers, or those of several annotators.
        type: kind of question; "" when the data has none.
        boxes: (left, top, right, bottom) px of the objects that answer the question, if known.
        where: file and line of the sample, for errors.
    """

    id: str
    image: Path | Callable[[], Image.Image]
    question: str
    answers: tuple[str, ...]
    type: str = ""
    boxes: tuple[Box, ...] = ()
    where: str = ""

    def open(self) -> Image.Image:
        """Return the image, RGB; raise :class:`DataError` if it cannot be read."""
        return open_image(self.image) if isinstance(self.image, Path) else self.image().convert("RGB")


def load_data(
    source: str | Path,
    *,
    image_column: str = "image",
    question_column: str = "question",
    answer_column: str = "answer",
    limit: int | None = None,
) -> list[Sample]:
    """Read a data set and validate all of it except the pixels of the images.

    Args:
        source: "reference" for the bundled benchmark's test split, or a ``.jsonl``, ``.csv`` or ``.parquet`` file.
        image_column: image files, relative to the data file; in parquet also the files' bytes.
        question_column, answer_column: text; an answer may be a list (several annotators).
        limit: largest number of samples: a fixed random choice of images with all their questions. A larger limit
            includes the samples of a smaller one.

    The columns ``id`` and ``type`` are used if they exist.

    Raises:
        DataError: one line naming the file, the line and the mistake.
        MissingExtra: the extra that the source needs is not installed.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1; got {limit}")
    if str(source) == "reference":
        samples = _reference()
    else:
        samples = _from_file(Path(source), image_column, question_column, answer_column)
    return samples if limit is None else _limited(samples, limit)


def _reference() -> list[Sample]:
    from tokensieve.reference.benchmark import benchmark

    rows = benchmark()
    images: dict[Any, Callable[[], Image.Image]] = {row.scene: partial(getattr, row, "image") for row in rows}
    return [Sample(r.id, images[r.scene], r.question, (r.answer,), r.type, r.boxes) for r in rows]


def _from_file(path: Path, image_column: str, question_column: str, answer_column: str) -> list[Sample]:
    samples: dict[str, Sample] = {}
    checked: set[Path] = set()
    for number, (where, row) in enumerate(read_records(path), 1):
        image = _image(_cell(where, row, image_column), path.parent, where)
        question, answers = _cell(where, row, question_column), _answers(_cell(where, row, answer_column), where)
        if not isinstance(question, str | None):
            raise DataError(f"{where}: a question is text; got {question!r}")
        if not question or not question.strip():
            raise DataError(f"{where}: the question is empty")
        if isinstance(image, Path) and image not in checked:
            try:
                check_image(image)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            checked.add(image)
        name = str(number if row.get("id") in (None, "") else row["id"])
        if name in samples:
            raise DataError(f"{where}: the id {name!r} is used twice")
        samples[name] = Sample(name, image, question.strip(), answers, str(row.get("type") or ""), where=where)
    if not samples:
        raise DataError(f"{path}: no rows")
    return list(samples.values())


def _cell(where: str, row: dict[str, Any], column: str) -> Any:
    if column not in row:
        near = difflib.get_close_matches(column, row, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{where}: no column {column!r} among {', '.join(map(repr, row))}{hint}")
    return row[column]


def _image(value: Any, folder: Path, where: str) -> Path | Callable[[], Image.Image]:
    if isinstance(value, dict):  # the datasets library stores images in parquet so
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return partial(decode_image, value, f"the image of {where}")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: the image is a file name; got {value!r}")
    return folder / value


def _answers(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a CSV cell
        with suppress(json.JSONDecodeError):  # an answer may merely start with a bracket
            value = json.loads(value)
    values = value if isinstance(value, list) else [value]
    values = [v.get("answer") if isinstance(v, dict) else v for v in values]  # VQAv2 lists {"answer": …}
    if not values or not all(isinstance(v, str | int | float) and str(v).strip() for v in values):
        raise DataError(f"{where}: an answer is text or a list of texts, none empty; got {value!r}")
    return tuple(str(v).strip() for v in values)


def _limited(samples: Sequence[Sample], limit: int) -> list[Sample]:
    images = list(dict.fromkeys(sample.image for sample in samples))
    random.Random(0).shuffle(images)
    rank = {image: place for place, image in enumerate(images)}
    # whole images in shuffled order up to the limit, then the data's own order again
    chosen = sorted(range(len(samples)), key=lambda i: (rank[samples[i].image], i))[:limit]
    return [samples[i] for i in sorted(chosen)]


# -- files of named values -------------------------------------------------------------------------------------------


def read_records(path: Path) -> Iterator[Record]:
    """Yield the rows of a file, read as its ending says.

    Raises:
        DataError: no such file, an unknown ending, or a row that cannot be read.
        MissingExtra: parquet without the ``data`` extra.
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
        raise MissingExtra('reading parquet needs pyarrow: in the checkout, pip install -e ".[data]"') from error
    try:
        for number, row in enumerate(parquet.read_table(path).to_pylist(), 1):
            yield f"{path}, row {number}", row
    except ArrowException as error:
        raise DataError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
