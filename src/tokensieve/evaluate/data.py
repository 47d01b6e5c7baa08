"""Questions about images: the bundled benchmark, or the user's JSONL, CSV or parquet file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

Box = tuple[float, float, float, float]


class DataError(ValueError):
    """The user's data cannot be used: one line that says where and why."""


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        id: unique in its data set.
        image: a file, or a function that makes the image; opened by :meth:`open` only.
        question: never empty.
        answers: accepted answers, or those of several annotators.
        type: kind of question; "" when the data has none.
        boxes: (left, top, right, bottom) px of what one must see, where known.
    """

    id: str
    image: Path | Callable[[], Image.Image]
    question: str
    answers: tuple[str, ...]
    type: str = ""
    boxes: tuple[Box, ...] = ()

    def open(self) -> Image.Image:
        """The image, RGB. Raises :class:`DataError` if it cannot be read."""
        raise NotImplementedError


def load_data(
    source: str | Path,
    *,
    image_column: str = "image",
    question_column: str = "question",
    answer_column: str = "answer",
    limit: int | None = None,
) -> list[Sample]:
    """Read a data set and check it as far as that is possible without decoding an image.

    Args:
        source: "reference" for the bundled benchmark's test split, or a ``.jsonl``, ``.csv`` or ``.parquet`` file.
        image_column: image files, relative to the data file.
        question_column, answer_column: text; an answer may be a list (several annotators).
        limit: at most so many samples, evenly spread over the file.

    Columns ``id`` and ``type`` are used when they are there.

    Raises:
        DataError: one line naming file, line and what is wrong.
        ImportError: for parquet without the ``data`` extra.
    """
    raise NotImplementedError


def open_image(path: str | Path) -> Image.Image:
    """Open and decode an image file as RGB.

    Raises:
        DataError: no such file, not an image, damaged, or more pixels than :data:`MAX_PIXELS`.
    """
    raise NotImplementedError
