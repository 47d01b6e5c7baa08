"""The question set of the reference model: each question type once per scene, with the scores of guessing rules."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tokensieve.errors import Refusal
from tokensieve.reference.questions import ANSWERS, TYPES, Type, ask, cells
from tokensieve.reference.scenes import Scene, scene
from tokensieve.reference.things import Box
from tokensieve.reference.vocabulary import NOTHING

if TYPE_CHECKING:
    from PIL import Image

SCENES = 300  # 3,900 questions: a standard error of less than a point
QUESTIONS_SHA256 = "3aecbf067d99de42ad19a91f94337422524682d8995fe86cd603869572089c61"
PIXELS_SHA256 = "5bbaaa52d3b6937d5011a60087e17a1c615784a3376fe291f37bb028040c113a"


@dataclass(frozen=True)
class Row:
    """One question about one image, or about the last of several.

    The answer depends on the `boxes` (left, top, right, bottom in px) of the scene. There are none if the right answer
    is that a thing is absent; then any selection of tokens will do. `accepted` are all right answers, `turns` the
    questions and answers of earlier turns, and `before` the scenes of the images before the question's own.
    """

    id: str
    question: str
    answer: str
    type: Type
    boxes: tuple[Box, ...]
    scene: Scene
    accepted: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    before: tuple[Scene, ...] = ()

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """Return the scenes of all images, in their order."""
        return (*self.before, self.scene)

    @property
    def image(self) -> Image.Image:
        """Return the scene, RGB, 120 × 120 px; it is drawn once and shared by all rows about it."""
        return self.scene.image


def benchmark(
    split: str = "test", scenes: int = SCENES, seed: int = 0, types: tuple[Type, ...] = TYPES
) -> tuple[Row, ...]:
    """Return the rows of a split, scene by scene. Check the default test set against its published hashes.

    Raises:
        Refusal: if the split or a type is unknown, or `scenes` is not positive.
        RuntimeError: if the default test set differs from the published questions.
    """
    if scenes < 1:
        raise Refusal(f"scenes must be at least 1, got {scenes}")
    for type in types:
        if type not in TYPES:
            raise Refusal(f"question type {type!r} is unknown; use some of {', '.join(TYPES)}")
    rows: list[Row] = []
    for index in range(scenes):
        drawn = scene(split, index, seed)
        for type in types:
            question = ask(drawn, type, np.random.default_rng((11, seed, index, TYPES.index(type))))
            name = f"{split}-{seed}-{index:05d}-{type}"
            parts = question.boxes, drawn, question.accepted, question.turns, question.before
            rows.append(Row(name, question.text, question.answer, type, *parts))
    if (split, scenes, seed, types) == ("test", SCENES, 0, TYPES):
        _check(rows)
    return tuple(rows)


def questions_sha256(rows: Iterable[Row]) -> str:
    """Hash the ids, questions, answers, types, boxes, and where there are any, other answers and earlier turns."""
    digest = hashlib.sha256()
    for row in rows:
        values: list[Any] = [row.id, row.question, row.answer, row.type, row.boxes]
        values += [part for part in (row.accepted[1:], row.turns) if part]
        digest.update(json.dumps(values).encode())
    return digest.hexdigest()


def pixels_sha256(rows: Iterable[Row]) -> str:
    """Hash the images, each scene once."""
    digest = hashlib.sha256()
    for drawn in dict.fromkeys(drawn for row in rows for drawn in row.scenes):
        digest.update(drawn.image.tobytes())
    return digest.hexdigest()


def _check(rows: list[Row]) -> None:
    if questions_sha256(rows) != QUESTIONS_SHA256:
        raise RuntimeError(
            "the reference test set differs from the published one: NumPy, scikit-learn or scikit-image changed its"
            " data or random streams, or the generator was edited"
        )
    if pixels_sha256(rows) != PIXELS_SHA256:
        warnings.warn(
            "the reference test images differ in pixels from the published ones (another Pillow or FreeType version):"
            " do not compare your numbers with the published table",
            stacklevel=3,
        )


def hallucinated(rows: Sequence[Row], texts: Sequence[str]) -> float:
    """Return the share of the questions about a thing that is not there to which the answer is not "nothing"."""
    answers = [text for row, text in zip(rows, texts, strict=True) if row.answer == NOTHING]
    return sum(text != NOTHING for text in answers) / len(answers)


@dataclass(frozen=True)
class Shortcut:
    """Scores on a question type without understanding the question, as shares of 1."""

    chance: float  # a random answer of the type
    majority: float  # the commonest answer
    best: float  # the best rule that knows the scene but not the thing in question (or the majority, if better)
    rule: str


def shortcuts(rows: Iterable[Row]) -> dict[Type, Shortcut]:
    """Compute chance, majority answer and best shortcut of each question type in the rows."""
    by_type: dict[Type, list[Row]] = {}
    for row in rows:
        by_type.setdefault(row.type, []).append(row)
    return {type: _shortcut(type, by_type[type]) for type in TYPES if type in by_type}


def _shortcut(type: Type, rows: list[Row]) -> Shortcut:
    majority = Counter(answer for row in rows for answer in row.accepted).most_common(1)[0][1] / len(rows)
    values = {"majority answer": majority}
    for rule, candidates in _RULES.get(type, {}).items():
        values[rule] = float(np.mean([_share(row.accepted, candidates(row)) for row in rows]))
    rule = max(values, key=lambda name: values[name])
    chance = float(np.mean([len(row.accepted) for row in rows])) / len(ANSWERS[type])
    return Shortcut(chance, majority, values[rule], rule)


def _share(accepted: tuple[str, ...], candidates: list[str]) -> float:
    return sum(candidate in accepted for candidate in candidates) / len(candidates)


def _commonest(values: Iterable[str]) -> list[str]:
    counts = Counter(values)
    return [value for value, count in counts.items() if count == max(counts.values())]


def _of_kind(row: Row) -> list[str]:
    """Return the names of the scene's objects of the same kind (digit or icon) as the thing in question."""
    (kind,) = {thing.kind for thing in row.scene.objects if thing.box == row.boxes[0]}
    return [thing.name for thing in row.scene.of(kind)]


def _colours_of_kind(row: Row) -> list[str]:
    return [thing.colour for thing in row.scene.objects if thing.name in _of_kind(row)]


def _colours_in_images(row: Row) -> list[str]:
    """Return the colours that the thing in question has in the images."""
    (name,) = {thing.name for thing in row.scene.objects if thing.box == row.boxes[0]}
    return [thing.colour for drawn in row.scenes for thing in drawn.objects if thing.name == name]


# Rules by question type. Each maps a row to candidate answers, of which it picks one at random.
_RULES: dict[Type, dict[str, Callable[[Row], list[str]]]] = {
    "colour": {"colour of any object of the asked kind": _colours_of_kind},
    "name": {"name of any object": lambda row: [thing.name for thing in row.scene.objects]},
    "where": {
        "corner with most objects": lambda row: _commonest(thing.place for thing in row.scene.objects),
        "corner with most objects of the asked kind": lambda row: _commonest(
            thing.place for thing in row.scene.objects if thing.name in _of_kind(row)
        ),
    },
    "beside": {"any digit that is beside an icon": lambda row: [digit.name for _, digit in row.scene.pairs]},
    "frame": {"commonest frame in the scene": lambda row: _commonest(thing.frame for thing in row.scene.objects)},
    "point": {
        "any object of the asked kind": lambda row: [
            cells(thing.box)[0] for thing in row.scene.objects if thing.name in _of_kind(row)
        ]
    },
    "images": {"colour of the thing in either image": _colours_in_images},
    "hop": {"colour of any digit that is beside an icon": lambda row: [digit.colour for _, digit in row.scene.pairs]},
    # the rule sees the thing in question, but takes every premise for true
    "absent": {"the right answer, but never nothing": lambda row: [row.answer if row.boxes else ""]},
    "turn": {
        "colour of any object of the asked kind, but not that of the first turn": lambda row: [
            colour for colour in _colours_of_kind(row) if (colour,) not in {turn[1:] for turn in row.turns}
        ]
    },
}
