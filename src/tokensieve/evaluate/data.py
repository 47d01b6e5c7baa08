"""Questions about images, from the bundled benchmark or from a data set of the user."""

from __future__ import annotations

import difflib
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tokensieve.errors import DataError, Refusal
from tokensieve.evaluate.pictures import Picture, open_picture, picture_of
from tokensieve.evaluate.records import Record, read_records

if TYPE_CHECKING:
    from tokensieve.reference.benchmark import Row

Box = tuple[float, float, float, float]
IMAGE_COLUMN = "image"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Sample:
    """One question about one image, or about several.

    Attributes:
        id: unique in its data set.
        image: a file, or a function that returns the image; a tuple of them for a question about several images. Read
            by :meth:`open` only. Samples about the same image have equal values here.
        question: never empty.
        answers: accepted answers, or those of several annotators.
        type: kind of question; "" when the data has none.
        boxes: (left, top, right, bottom) px of the objects that answer the question, if known, in the last image.
        where: file and line of the sample, for errors.
        choices: the options of a multiple-choice question; the prompt lists them with the letters A, B, C… The answer
            is the text of a choice or its letter.
        turns: (question, answer) of earlier turns of the conversation; the images belong to the first.
    """

    id: str
    image: Picture | tuple[Picture, ...]
    question: str
    answers: tuple[str, ...]
    type: str = ""
    boxes: tuple[Box, ...] = ()
    where: str = ""
    choices: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def images(self) -> tuple[Picture, ...]:
        """The images in their order, mostly one."""
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def text(self) -> str:
        """The question, with its choices on lines of their own: "A. red"."""
        options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question, *options])

    @property
    def error_prefix(self) -> str:
        """File and line in front of an error's text; "" where they are not known."""
        return f"{self.where}: " if self.where else ""

    def open(self, number: int = 0) -> Image.Image:
        """Return one of the images, 8-bit RGB; raise :class:`DataError` with file and line if it cannot be read."""
        try:
            return open_picture(self.images[number])
        except DataError as error:
            raise DataError(f"{self.error_prefix}{error}") from error

    def open_all(self) -> list[Image.Image]:
        """Return all images, 8-bit RGB; raise :class:`DataError` with file and line if one cannot be read."""
        return [self.open(number) for number in range(len(self.images))]


def load_data(
    source: str | Path,
    *,
    image_column: str = IMAGE_COLUMN,
    question_column: str = "question",
    answer_column: str = "answer",
    split: str | None = None,
    fetch_images: bool = False,
    types: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[Sample]:
    """Read a data set and validate all of it except the pixels of the images.

    Args:
        source: "reference" for the bundled benchmark's test split; a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or
            ``.parquet`` file; a folder of the datasets library; or a data set's name on the hub.
        image_column: an image or a list of them: file names relative to the data, ``data:`` URIs, or in tables bytes.
        question_column, answer_column: text; an answer may be a list (several annotators).
        split: a split of a folder or of a data set of the hub, needed if it has several.
        fetch_images: allow images given as http(s) URLs, each fetched when it is opened first.
        types: question types to keep; all of them if ``None``.
        limit: largest number of samples: a fixed random choice of images with all their questions. A larger limit
            includes the samples of a smaller one.

    The columns ``id``, ``type``, ``choices`` and ``turns`` are used if they exist; ``turns`` is a list of earlier turns
    of the conversation, each a list of question and answer. ``images`` may stand for the column ``image``.

    Raises:
        DataError: one line naming the file, the line and the mistake.
        MissingExtra: the extra that the source needs is not installed.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1; got {limit}")
    if str(source) == "reference":
        if split is not None:
            raise DataError(f"the bundled benchmark is its test split; got split {split!r}")
        samples = _reference()
    else:
        columns = image_column, question_column, answer_column
        samples = _read(source, read_records(source, split), columns, fetch_images)
    if types is not None:
        samples = _of_types(samples, types)
    return samples if limit is None else _limited(samples, limit)


def check_text(text: str, name: str) -> None:
    """Refuse a text that no tokenizer accepts: one with lone surrogates, or with a NUL character.

    Raises:
        Refusal: naming the text.
    """
    if wrong := re.search("[\ud800-\udfff]", text):
        kind = "a byte that is not UTF-8" if "\udc80" <= wrong[0] <= "\udcff" else "half of a character"
        raise Refusal(f"{name} is not valid text: {kind} ({wrong[0]!a}) in {text[:100]!a}")
    if "\0" in text:
        raise Refusal(f"{name} is not valid text: a NUL character in {text[:100]!a}")


def _reference() -> list[Sample]:
    from tokensieve.reference.benchmark import benchmark

    return reference_samples(benchmark())


def reference_samples(rows: Sequence[Row]) -> list[Sample]:
    """Return questions of the bundled benchmark as samples; those about one scene share its image."""
    images: dict[Any, Callable[[], Image.Image]] = {
        drawn: partial(getattr, drawn, "image") for row in rows for drawn in row.scenes
    }
    return [
        Sample(
            id=row.id,
            image=tuple(images[drawn] for drawn in row.scenes) if row.before else images[row.scene],
            question=row.question,
            answers=row.accepted,
            type=row.type,
            boxes=row.boxes,
            turns=row.turns,
        )
        for row in rows
    ]


def _read(source: str | Path, records: Any, columns: tuple[str, str, str], fetch_images: bool) -> list[Sample]:
    samples: dict[str, Sample] = {}
    files: dict[str, Picture] = {}  # by file name: a file that many questions share is checked once
    for number, record in enumerate(records, 1):
        try:
            sample = sample_of(record, str(number), columns, files, fetch_images=fetch_images)
        except Refusal as error:
            line = " ".join(str(error).splitlines())  # a file name may hold a line break
            raise DataError(f"{record.where}: {line}") from None
        if sample.id in samples:
            raise DataError(f"{record.where}: the id {sample.id!r} is used twice")
        samples[sample.id] = sample
    if not samples:
        raise DataError(f"{source}: no rows")
    return list(samples.values())


def sample_of(
    record: Record,
    number: str,
    columns: tuple[str, str, str],
    files: dict[str, Picture],
    *,
    fetch_images: bool,
    answered: bool = True,
) -> Sample:
    """Return the question in a row, validated except for the pixels of its images.

    Args:
        record: the row.
        number: the id of a row without one.
        columns: those of images, questions and answers.
        files: images by file name, extended here; a file that many questions share is checked once.
        fetch_images: allow URLs.
        answered: the row must hold right answers; otherwise it may.

    Raises:
        Refusal: naming the mistake, without the row's place.
    """
    image_column, question_column, answer_column = columns
    row = record.values
    if "conversations" in row and question_column not in row:
        row = row | _first_turns(row["conversations"], question_column, answer_column)
    if image_column == IMAGE_COLUMN and image_column not in row and "images" in row:
        image_column = "images"
    values = _listed(_cell(row, image_column))
    several = isinstance(values, list)

    def picture(place: int, value: Any) -> Picture:
        if isinstance(value, str) and value in files:
            return files[value]

        def again() -> Any:
            cell = _listed(record.again()[image_column])
            return cell[place] if several else cell

        image = picture_of(value, record.folder, again, fetch_images=fetch_images)
        if isinstance(value, str):
            files[value] = image
        return image

    pictures = tuple(picture(place, value) for place, value in enumerate(values if several else [values]))
    if not pictures:
        raise DataError("the list of images is empty")
    question = _cell(row, question_column)
    if not isinstance(question, str | None):
        raise DataError(f"a question is text; got {question!r}")
    if not question or not question.strip():
        raise DataError("the question is empty")
    check_text(question, "the question")
    choices = _choices(row.get("choices"))
    answers: tuple[str, ...] = ()
    if answered or row.get(answer_column) is not None:
        answers = _answers(_cell(row, answer_column))
        _check_choice(answers, choices)
    return Sample(
        id=_text(row.get("id"), "an id") or number,
        image=pictures if len(pictures) > 1 else pictures[0],
        question=question.strip(),
        answers=answers,
        type=_text(row.get("type"), "a type"),
        where=record.where,
        choices=choices,
        turns=_turns(row.get("turns")),
    )


def _cell(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        near = difflib.get_close_matches(column, row, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"no column {column!r} among {', '.join(map(repr, row))}{hint}")
    return row[column]


def _listed(value: Any) -> Any:
    """Return a JSON list in a text cell (of a CSV file) as a list; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(json.JSONDecodeError):  # a text may merely start with a bracket
            return json.loads(value)
    return value


def _text(value: Any, kind: str) -> str:
    """Return a text or a number as stripped text, and a missing value as ""."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables with missing values store whole numbers as 3.0
    # JSON's NaN marks a missing value, and no model answers "True" where a person would write "yes"
    unusable = isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))
    if unusable or not isinstance(value, str | int | float):
        raise DataError(f"{kind} is text or a number; got {value!r:.100}")
    text = str(value).strip()
    check_text(text, kind)
    return text


def _answers(value: Any) -> tuple[str, ...]:
    values = _listed(value)
    values = values if isinstance(values, list) else [values]
    values = [v.get("answer") if isinstance(v, dict) else v for v in values]  # VQAv2 lists {"answer": …}
    answers = tuple(_text(v, "an answer") for v in values)
    if not answers or not all(answers):
        raise DataError(f"an answer is text or a list of texts, none empty; got {value!r:.100}")
    return answers


def _choices(value: Any) -> tuple[str, ...]:
    values = _listed(value)
    if values in (None, "", []):
        return ()
    if not isinstance(values, list):
        raise DataError(f"choices are a list of texts; got {value!r:.100}")
    choices = tuple(_text(v, "a choice") for v in values)
    if len(choices) > len(LETTERS) or not all(choices):
        raise DataError(f"choices are at most {len(LETTERS)} texts, none empty; got {value!r:.100}")
    return choices


def _turns(value: Any) -> tuple[tuple[str, str], ...]:
    turns = _listed(value)
    if turns in (None, "", []):
        return ()
    if not isinstance(turns, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        raise DataError(f"turns are a list of [question, answer]; got {value!r:.100}")
    texts = tuple((_text(turn[0], "a turn's question"), _text(turn[1], "a turn's answer")) for turn in turns)
    if not all(text for turn in texts for text in turn):
        raise DataError(f"turns hold no empty question or answer; got {value!r:.100}")
    return texts


def _check_choice(answers: tuple[str, ...], choices: tuple[str, ...]) -> None:
    """Refuse answers that name no choice: a number, for example, may count from 0 or from 1."""
    letters, texts = LETTERS[: len(choices)], {choice.casefold() for choice in choices}
    names = [answer.casefold() in texts or answer.strip("().: ").upper() in set(letters) for answer in answers]
    if choices and not any(names):
        got = ", ".join(map(repr, answers))
        raise DataError(f"an answer is the text of a choice or its letter, A to {letters[-1]}; got {got:.100}")


def _first_turns(turns: Any, question_column: str, answer_column: str) -> dict[str, Any]:
    """Return the first question and answer of a LLaVA-style conversation, without the places of its images."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("conversations are a list of {'from': …, 'value': …}")
    by_speaker = {turn.get("from"): turn.get("value") for turn in reversed(turns)}
    if not isinstance(by_speaker.get("human"), str) or "gpt" not in by_speaker:
        raise DataError("a conversation has a 'human' and a 'gpt' turn")
    # images stand before the text anyway; a place inside the text is refused later, with the other placeholders
    question = re.sub(r"^(\s*<image>\s*)+|(\s*<image>\s*)+$", "", by_speaker["human"])
    return {question_column: question, answer_column: by_speaker["gpt"]}


def types_known_to(model: Any, source: str | Path) -> tuple[str, ...] | None:
    """Return the question types of the bundled benchmark that a classifier of answers knows; ``None`` means all.

    A classifier answers in one word to one question about one image.
    """
    from tokensieve.reference.vilt import ASKED

    return ASKED if str(source) == "reference" and not model.can_generate() else None


def _of_types(samples: Sequence[Sample], types: Sequence[str]) -> list[Sample]:
    known = list(dict.fromkeys(sample.type for sample in samples if sample.type))
    for type in types:
        if type not in known:
            names = f"they are {', '.join(known)}" if known else "the data have no column 'type'"
            raise DataError(f"no question of type {type!r}; {names}")
    return [sample for sample in samples if sample.type in types]


def _limited(samples: Sequence[Sample], limit: int) -> list[Sample]:
    images = list(dict.fromkeys(sample.image for sample in samples))
    random.Random(0).shuffle(images)
    rank = {image: place for place, image in enumerate(images)}
    # whole images in shuffled order up to the limit, then the data's own order again
    chosen = sorted(range(len(samples)), key=lambda i: (rank[samples[i].image], i))[:limit]
    return [samples[i] for i in sorted(chosen)]
