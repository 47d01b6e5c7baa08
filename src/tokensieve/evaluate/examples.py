"""The few images that a report shows through every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokensieve.errors import OutputError
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.results import Example

FOLDER = "examples"
LARGEST = 512  # px, longer side of a stored image


def choose(samples: Sequence[Sample], count: int) -> list[Sample]:
    """One question about each of the first ``count`` images; different ones where an image has several."""
    by_image: dict[Any, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(sample.image, []).append(sample)
    groups = list(by_image.values())[:count]
    return [group[i % len(group)] for i, group in enumerate(groups)]


def store(chosen: Sequence[Sample], output: Path) -> list[Example]:
    """Write the images under ``output`` and return the examples, nothing kept yet.

    Raises:
        DataError: an image that cannot be decoded.
        OutputError: if an image cannot be written.
    """
    examples = []
    for number, sample in enumerate(chosen):
        image, name = sample.open(), f"{FOLDER}/{number}.png"
        image.thumbnail((LARGEST, LARGEST))
        try:
            (output / FOLDER).mkdir(parents=True, exist_ok=True)
            image.save(output / name)
        except OSError as error:
            raise OutputError(f"cannot write {output / name}: {error.strerror or error}") from error
        examples.append(Example(sample.id, name, sample.question, sample.answers, ()))
    return examples
