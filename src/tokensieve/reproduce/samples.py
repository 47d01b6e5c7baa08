"""Rows of a benchmark to questions, with the prompts and the squared images of LLaVA-1.5's evaluation."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from tokensieve.errors import DataError, Refusal, nearest
from tokensieve.evaluate import Sample
from tokensieve.evaluate.data import LETTERS, sample_of
from tokensieve.evaluate.pictures import Picture, StoredImage, content_key
from tokensieve.evaluate.records import Record
from tokensieve.reproduce.files import read
from tokensieve.reproduce.recipes import Benchmark

NO_ANSWER = "(no answer)"  # of an annotator; a prediction never is this
COLUMNS = "image", "question", "answer"


@dataclass(frozen=True)
class Questions:
    """The questions of a benchmark.

    Attributes:
        samples: as the model is asked.
        groups: by the id of a sample, the group that it is scored with.
        names: by the id of a sample, the id of the question in the benchmark.
        total: rows in the data, before a limit.
    """

    samples: list[Sample]
    groups: dict[str, str]
    names: dict[str, str]
    total: int


def questions(
    benchmark: Benchmark, folder: Path, *, limit: int | None = None, colour: tuple[int, int, int] | None = None
) -> Questions:
    """Read a benchmark.

    Args:
        folder: files as on the hub.
        limit: largest number of rows; whole groups in a fixed random order. A larger limit includes a smaller one.
        colour: pad images to squares with it; ``None`` leaves them as they are.

    Raises:
        DataError: one line naming the file, the row and the mistake.
    """
    records = list(_wanted(benchmark, folder))
    if not records:
        raise DataError(f"{folder}: no rows of {benchmark.title}")
    images = _images_apart(benchmark, folder)
    groups = [str(record.values[benchmark.group]) if benchmark.group else str(i) for i, record in enumerate(records)]
    numbers = range(len(records)) if limit is None else _limited(_joined(benchmark, groups), limit)
    samples, files = list[Sample](), dict[str, Picture]()
    for number in numbers:
        record = records[number]
        try:
            row = _row(benchmark, record, images)
            sample = sample_of(row, str(number), COLUMNS, files, fetch_images=False)
        except Refusal as error:
            raise DataError(f"{record.where}: {error}") from None
        samples.append(sample if colour is None else _squared(sample, colour))
    names = {str(number): str(records[number].values.get("question_id", number)) for number in numbers}
    return Questions(samples, {str(number): groups[number] for number in numbers}, names, len(records))


def prompt_of(benchmark: Benchmark, values: Mapping[str, Any]) -> str:
    """Return the text of the user turn for one row."""
    hint = _text(values.get("hint"))
    options = _options(benchmark, values)
    question = _text(values.get("question"))
    if benchmark.leave_out:
        question = question.replace(benchmark.leave_out, "").strip()
    parts = {
        **values,
        "question": question.capitalize() if benchmark.capitalise else question,
        "options": "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)),
        "hint_line": f"{hint}\n" if hint else "",
        "context_line": f"Context: {hint}\n" if hint else "",
        "ocr": ", ".join(map(str, values.get("ocr_tokens") or [])),
    }
    return benchmark.prompt.format_map(parts)


def _wanted(benchmark: Benchmark, folder: Path) -> Iterator[Record]:
    checked = False
    for record in read(benchmark, folder, benchmark.config):
        if not checked:
            _check_columns(benchmark, record)
            checked = True
        if benchmark.only is None or record.values[benchmark.only[0]] in benchmark.only[1]:
            yield record


def _check_columns(benchmark: Benchmark, record: Record) -> None:
    for column in benchmark.columns:
        if column not in record.values:
            raise DataError(
                f"{record.where}: {benchmark.title} has a column {column!r}; {nearest(column, record.values)}"
            )


def _images_apart(benchmark: Benchmark, folder: Path) -> dict[Any, Record]:
    """Return the rows that hold the images, by their id, if they are in a config of their own."""
    if benchmark.images is None:
        return {}
    rows = {}
    for record in read(benchmark, folder, benchmark.images[0]):
        for column in ("id", "image"):
            if column not in record.values:
                raise DataError(f"{record.where}: no column {column!r} among {', '.join(record.values)}")
        rows[record.values["id"]] = record
    return rows


def _row(benchmark: Benchmark, record: Record, images: Mapping[Any, Record]) -> Record:
    """Return a row with the columns image, question, answer and type only."""
    values, source = record.values, record
    if benchmark.images is not None:
        name = values[benchmark.images[1]]
        if name not in images:
            raise DataError(f"there is no image {name!r} in {benchmark.images[0]}")
        source = images[name]
    type = str(values[benchmark.type]) if benchmark.type else ""
    text, answer = prompt_of(benchmark, values), _answer(benchmark, values)
    named = {"image": source.values["image"], "question": text, "answer": answer, "type": type}
    return Record(record.where, named, record.folder, lambda: {"image": source.again()["image"]})


def _answer(benchmark: Benchmark, values: Mapping[str, Any]) -> Any:
    answer = values[benchmark.answer]
    if isinstance(answer, list):  # of annotators
        texts = [entry.get("answer") if isinstance(entry, dict) else entry for entry in answer]
        return [text if _text(text) else NO_ANSWER for text in texts]
    if benchmark.options and isinstance(answer, int):
        if answer not in range(len(_options(benchmark, values))):
            raise DataError(f"the answer is the number of an option, from 0; got {answer}")
        return LETTERS[answer]
    return answer


def _options(benchmark: Benchmark, values: Mapping[str, Any]) -> list[str]:
    """Return the texts of the options; as in LLaVA's evaluation, the first empty one ends them."""
    cells = [values[column] for column in benchmark.options]
    cells = cells[0] if len(cells) == 1 and isinstance(cells[0], list) else cells
    texts = [_text(cell) for cell in cells]
    return texts[: texts.index("")] if "" in texts else texts


def _text(value: Any) -> str:
    """Return a cell as it is, as text; "" for a missing one, which tables write as NaN, "nan" or "none" as well."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    text = "" if missing else str(value)
    return "" if text.strip().lower() in ("", "nan", "none") else text


def _joined(benchmark: Benchmark, groups: list[str]) -> list[str]:
    """Return the groups with the rotations of a question of MMBench in one."""
    if benchmark.total != "circular":
        return groups
    from tokensieve.reproduce.totals import CIRCULAR

    return [str(int(group) % CIRCULAR) if group.isdecimal() else group for group in groups]


def _limited(groups: list[str], limit: int) -> list[int]:
    members: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    names = list(members)
    random.Random(0).shuffle(names)
    kept: list[int] = []
    for name in names:
        if len(kept) + len(members[name]) > limit:
            break
        kept += members[name]
    if not kept:
        raise Refusal(f"--limit {limit} holds no whole question; the smallest here is {len(members[names[0]])}")
    return sorted(kept)


# -- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SquareImage(StoredImage):
    """An image that is padded to a square, itself in the middle.

    Attributes:
        colour: of the padding, RGB.
        open_image: returns the image itself.
    """

    colour: tuple[int, int, int] = (0, 0, 0)
    open_image: Callable[[], Image.Image] = field(default=Image.Image, compare=False, repr=False)

    def __call__(self) -> Image.Image:
        """Return the padded image."""
        return square(self.open_image(), self.colour)


def square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Return an RGB image in the middle of a square of a colour; offsets are rounded down."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _squared(sample: Sample, colour: tuple[int, int, int]) -> Sample:
    pictures = []
    for number, picture in enumerate(sample.images):
        digest = f"{content_key(picture)} in a square of {colour}"
        pictures.append(SquareImage(digest, bytes, colour, lambda number=number: sample.open(number)))  # type: ignore[misc]
    return replace(sample, image=pictures[0] if len(pictures) == 1 else tuple(pictures))
