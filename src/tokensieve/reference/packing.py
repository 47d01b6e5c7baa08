"""Training data as arrays: many questions about one image, or about two, packed into one sequence.

A pack is `<s> USER: image tokens, question 1, …, question 17`. Under a block mask each question attends only to the
image and to itself, so many questions cost little more than one. Half of the questions are turned round, so that the
named thing is the last word before the answer ("? ASSISTANT: what colour is the anchor"). Without turned questions,
training stays at shortcuts; with them, the model also learns the natural phrasing. Two scenes that follow each other
share a second pack, of questions about two images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from tokensieve.reference.model import vocabulary
from tokensieve.reference.questions import Question, Type, ask, ask_second, shared
from tokensieve.reference.scenes import Scene, scene
from tokensieve.reference.things import covered
from tokensieve.reference.vocabulary import COLOURS, FRAMES, GRID, ICONS, NAMES, SIGNS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SLOTS: tuple[Type, ...] = (
    "colour", "name", "where", "beside", "beside", "frame", "read", "count", "exist", "exist",
    "point", "point", "point", "hop", "hop", "absent", "turn",
)  # fmt: skip
PAIR_SLOTS: tuple[Type, ...] = ("images",) * 4
LENGTH, PAIR_LENGTH = 175, 48  # text tokens in a pack: the longest phrasing of every slot
TOKENS = GRID * GRID
SEEN: tuple[str, ...] = (*NAMES, *SIGNS)  # names that a patch can show and CLS learns to list (then colours)
IGNORE = -1
ALONE = len(ICONS)  # neighbour of a digit that has none


@dataclass(frozen=True)
class Texts:
    """`v` packs of questions for each of `n` scenes or pairs of scenes; `L` text tokens about `I` image tokens.

    Attributes:
        tokens, targets, places: `[n, v, L]`; a place is a token's position within its question. A target is −1 where
            no answer is learned.
        slots: `[n, v, L]`, number of the question; −1 on padding.
        needed: `[n, v, I]`, bit `q` is set on the patches that question `q` depends on.
    """

    tokens: NDArray[np.int16]
    targets: NDArray[np.int16]
    places: NDArray[np.int8]
    slots: NDArray[np.int8]
    needed: NDArray[np.int32]


@dataclass(frozen=True)
class Packs:
    """`n` scenes with their labels and questions.

    Attributes:
        images: `[n, 120, 120, 3]` uint8.
        shown, colour, frame: `[n, 144]`, labels of each patch; −1 if none.
        neighbour: `[n, 144]`, the icon beside a digit, on patches of digits; else −1.
        present: `[n, names + signs + colours]` bool.
        single: the questions about each scene.
        pairs: the questions about the scenes 0 and 1, 2 and 3, …
    """

    images: NDArray[np.uint8]
    shown: NDArray[np.int8]
    colour: NDArray[np.int8]
    frame: NDArray[np.int8]
    neighbour: NDArray[np.int8]
    present: NDArray[np.bool_]
    single: Texts
    pairs: Texts

    def __len__(self) -> int:
        return len(self.images)


def make_packs(split: str, indices: Sequence[int], *, seed: int = 0, variants: int = 3, turned: float = 0.5) -> Packs:
    """Make packs for the scenes of a split with these indices; `turned` is the share of questions turned round."""
    count, listed = len(indices), len(SEEN) + len(COLOURS)
    shown, colour, frame, neighbour = (np.full((count, TOKENS), IGNORE, np.int8) for _ in range(4))
    images, present = np.empty((count, 120, 120, 3), np.uint8), np.zeros((count, listed), np.bool_)
    single = _empty(count, variants, LENGTH, TOKENS)
    pairs = _empty(count // 2, variants, PAIR_LENGTH, 2 * TOKENS)
    before: Scene | None = None
    for number, index in enumerate(indices):
        drawn = scene(split, index, seed)
        rng = np.random.default_rng((7, drawn.seed, drawn.index))
        images[number] = np.asarray(drawn.render())
        _label(drawn, [label[number] for label in (shown, colour, frame, neighbour)], present[number])
        for variant in range(variants):
            _pack(single, (number, variant), [ask(drawn, type, rng) for type in SLOTS], turned, rng)
        if before and number % 2 and shared(before, drawn):
            for variant in range(variants):
                questions = [ask_second(before, drawn, rng) for _ in PAIR_SLOTS]
                _pack(pairs, (number // 2, variant), questions, turned, rng)
        before = drawn
    return Packs(images, shown, colour, frame, neighbour, present, single, pairs)


def _empty(count: int, variants: int, length: int, tokens: int) -> Texts:
    shape = (count, variants, length)
    return Texts(
        tokens=np.zeros(shape, np.int16),
        targets=np.full(shape, IGNORE, np.int16),
        places=np.zeros(shape, np.int8),
        slots=np.full(shape, IGNORE, np.int8),
        needed=np.zeros((count, variants, tokens), np.int32),
    )


def _label(drawn: Scene, labels: Sequence[NDArray[np.int8]], present: NDArray[np.bool_]) -> None:
    """Write what each patch of a scene shows, `[144]` each, and what the scene holds."""
    shown, colour, frame, neighbour = labels
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


def _pack(
    texts: Texts, row: tuple[int, int], questions: list[Question], turned: float, rng: np.random.Generator
) -> None:
    """Write questions side by side into one row of the texts."""
    end = 0
    for number, question in enumerate(questions):
        words: list[str] = []
        for text, answer in question.turns:
            words += [*_ordered(text, turned, rng), *answer.split(), "</s>", "USER:"]
        words += _ordered(question.text, turned, rng)
        answers = [*question.answer.split(), "</s>"]
        ids = [_ids()[word] for word in [*words, *answers]]
        start, end = end, end + len(ids) - 1
        part = (*row, slice(start, end))
        texts.tokens[part], texts.places[part], texts.slots[part] = ids[:-1], range(end - start), number
        # each word of the answer, and `</s>`, is the target of the token before it
        texts.targets[(*row, slice(end - len(answers), end))] = ids[-len(answers) :]
        for box in question.boxes:
            # the question's scene is the last of its images
            texts.needed[(*row, np.array(covered(box)) + len(question.before) * TOKENS)] |= 1 << number


def _ordered(text: str, turned: float, rng: np.random.Generator) -> list[str]:
    """Return the words of a question up to the answer, turned round or in the order of the prompt."""
    words = text.removesuffix("?").split()
    return ["?", "ASSISTANT:", *words] if rng.random() < turned else [*words, "?", "ASSISTANT:"]


@lru_cache(maxsize=1)
def _ids() -> dict[str, int]:
    return {word: number for number, word in enumerate(vocabulary())}
