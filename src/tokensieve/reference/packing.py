"""Training data as arrays: many questions about one image, packed into one sequence.

A pack is `<s> USER: image tokens, question 1, …, question 10`. Under a block mask each question attends only to the
image and to itself, so ten questions cost little more than one. Half of the questions are turned round, so that the
named thing is the last word before the answer ("? ASSISTANT: what colour is the anchor"). Without turned questions,
training stays at shortcuts; with them, the model also learns the natural phrasing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from tokensieve.reference.model import vocabulary
from tokensieve.reference.questions import Question, Type, ask
from tokensieve.reference.scenes import Scene, scene
from tokensieve.reference.things import CANVAS, TOKEN, Box
from tokensieve.reference.vocabulary import COLOURS, FRAMES, ICONS, NAMES, SIGNS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SLOTS: tuple[Type, ...] = (
    "colour", "name", "where", "beside", "beside", "frame", "read", "count", "exist", "exist",
)  # fmt: skip
LENGTH = 92  # text tokens in a pack: the longest phrasing of every slot
GRID = CANVAS // TOKEN
TOKENS = GRID * GRID
SEEN: tuple[str, ...] = (*NAMES, *SIGNS)  # names that a patch can show and CLS learns to list (then colours)
IGNORE = -1
ALONE = len(ICONS)  # neighbour of a digit that has none


@dataclass(frozen=True)
class Packs:
    """`n` scenes, each with `v` packs of questions.

    Attributes:
        images: `[n, 120, 120, 3]` uint8.
        shown, colour, frame: `[n, 144]`, labels of each patch; −1 if none.
        neighbour: `[n, 144]`, the icon beside a digit, on patches of digits; else −1.
        present: `[n, names + signs + colours]` bool.
        tokens, targets, places: `[n, v, 92]`; a place is a token's position within its question.
        slots: `[n, v, 92]`, number of the question; −1 on padding.
        needed: `[n, v, 144]`, bit `q` is set on the patches that question `q` depends on.
    """

    images: NDArray[np.uint8]
    shown: NDArray[np.int8]
    colour: NDArray[np.int8]
    frame: NDArray[np.int8]
    neighbour: NDArray[np.int8]
    present: NDArray[np.bool_]
    tokens: NDArray[np.int16]
    targets: NDArray[np.int16]
    places: NDArray[np.int8]
    slots: NDArray[np.int8]
    needed: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.images)


def make_packs(split: str, indices: Sequence[int], *, seed: int = 0, variants: int = 3, turned: float = 0.5) -> Packs:
    """Make packs for the scenes of a split with these indices; `turned` is the share of questions turned round."""
    rows = (_row(scene(split, index, seed), variants, turned) for index in indices)
    first = next(rows)
    parts = [np.empty((len(indices), *part.shape), part.dtype) for part in first]
    for number, row in enumerate(chain([first], rows)):
        for part, value in zip(parts, row, strict=True):
            part[number] = value
    return Packs(*parts)


def covered(box: Box) -> list[int]:
    """Return the row-major indices of the visual tokens that a box covers by more than a third of their area."""
    left, top, right, bottom = box

    def overlap(low: int, high: int, token: int) -> int:
        return max(0, min(high, (token + 1) * TOKEN) - max(low, token * TOKEN))

    return [
        row * GRID + column
        for row in range(top // TOKEN, min(GRID, bottom // TOKEN + 1))
        for column in range(left // TOKEN, min(GRID, right // TOKEN + 1))
        if overlap(top, bottom, row) * overlap(left, right, column) * 3 > TOKEN * TOKEN
    ]


def _row(drawn: Scene, variants: int, turned: float) -> tuple[NDArray[np.generic], ...]:
    """Return the arrays of :class:`Packs` for one scene."""
    rng = np.random.default_rng((7, drawn.seed, drawn.index))
    shown, colour, frame, neighbour = (np.full(TOKENS, IGNORE, np.int8) for _ in range(4))
    present = np.zeros(len(SEEN) + len(COLOURS), np.bool_)
    for thing in drawn.things:
        if thing.kind == "clutter":
            continue
        patches = covered(thing.box)
        shown[patches] = SEEN.index(thing.name)
        present[SEEN.index(thing.name)] = True
        if thing.kind != "sign":
            colour[patches] = list(COLOURS).index(thing.colour)
            frame[patches] = FRAMES.index(thing.frame)
            present[len(SEEN) + list(COLOURS).index(thing.colour)] = True
        if thing.kind == "digit":
            neighbour[patches] = ALONE if thing.partner is None else list(ICONS).index(drawn.things[thing.partner].name)
    packs = zip(*(_pack([ask(drawn, type, rng) for type in SLOTS], turned, rng) for _ in range(variants)), strict=True)
    return (np.asarray(drawn.render()), shown, colour, frame, neighbour, present, *(np.stack(part) for part in packs))


def _pack(questions: list[Question], turned: float, rng: np.random.Generator) -> tuple[NDArray[np.generic], ...]:
    """Return tokens, targets, places, slots and needed patches of one pack."""
    tokens, targets = np.zeros(LENGTH, np.int16), np.full(LENGTH, IGNORE, np.int16)
    places, slots = np.zeros(LENGTH, np.int8), np.full(LENGTH, IGNORE, np.int8)
    needed = np.zeros(TOKENS, np.int16)
    end = 0
    for number, question in enumerate(questions):
        words = question.text.removesuffix("?").split()
        order = ["?", "ASSISTANT:", *words] if rng.random() < turned else [*words, "?", "ASSISTANT:"]
        ids = [_ids()[word] for word in [*order, question.answer, "</s>"]]
        start, end = end, end + len(ids) - 1
        tokens[start:end], places[start:end], slots[start:end] = ids[:-1], range(end - start), number
        targets[end - 2 : end] = ids[-2:]  # the answer and `</s>`, each at the token before it
        for box in question.boxes:
            needed[covered(box)] |= 1 << number
    return tokens, targets, places, slots, needed


@lru_cache(maxsize=1)
def _ids() -> dict[str, int]:
    return {word: number for number, word in enumerate(vocabulary())}
