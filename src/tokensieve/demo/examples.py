"""Images to choose from on the page, with questions whose right answers are known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokensieve.evaluate import Sample, load_data
from tokensieve.evaluate.pictures import Picture

COUNT = 8  # images
QUESTIONS = 7  # about each of them


@dataclass(frozen=True)
class Example:
    """One image and its questions."""

    picture: Picture
    samples: tuple[Sample, ...]


def examples(data: str) -> list[Example]:
    """Return a few images of a data set; of the bundled benchmark only these scenes are drawn.

    Args:
        data: as for :func:`~tokensieve.evaluate.load_data`. Questions about several images are left out.
    """
    samples = _scenes() if data == "reference" else load_data(data, limit=COUNT * QUESTIONS)
    by_image: dict[Any, list[Sample]] = {}
    for sample in samples:
        if len(sample.images) == 1:
            by_image.setdefault(sample.images[0], []).append(sample)
    return [Example(image, tuple(listed[:QUESTIONS])) for image, listed in list(by_image.items())[:COUNT]]


def _scenes() -> Iterable[Sample]:
    from tokensieve.reference.benchmark import benchmark

    rows = [row for row in benchmark(scenes=COUNT) if not row.before and not row.turns]  # one image, one question
    pictures = {row.scene: partial(getattr, row, "image") for row in rows}
    return [Sample(row.id, pictures[row.scene], row.question, row.accepted) for row in rows]
