"""Questions about a scene, their answers, and the boxes of the things that an answer depends on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from tokensieve.reference.scenes import Scene, scene
from tokensieve.reference.things import Box, Thing, covered
from tokensieve.reference.vocabulary import (
    COLOURS,
    COLUMNS,
    DIGITS,
    FRAMES,
    GRID,
    ICONS,
    NAMES,
    NOTHING,
    NUMBERS,
    PLACES,
    ROWS,
    SIGNS,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

Type = Literal[
    "colour", "name", "where", "beside", "frame", "read", "count", "exist",
    "point", "images", "hop", "absent", "turn",
]  # fmt: skip
TYPES: tuple[Type, ...] = get_args(Type)

# The named thing is the last word before the question mark, except in a phrase of `images`. `{}` is a thing's name, or
# its colour.
PHRASES: dict[Type, tuple[str, ...]] = {
    "colour": ("what colour is the {}?", "what is the colour of the {}?"),
    "name": ("what is the thing in {}?", "which thing is {}?"),
    "where": ("where is the {}?", "in which corner is the {}?"),
    "beside": ("which digit is beside the {}?", "what digit is next to the {}?"),
    "frame": ("what is the frame of the {}?", "what frame is around the {}?"),
    "read": ("what does the sign say?", "which word is on the sign?"),
    "count": ("how many digits are there?", "what is the number of digits?"),
    "exist": ("is there {}?", "do you see {}?"),
    "point": ("point to the {}?", "point at the {}?"),
    "images": ("what colour is the {} in the second image?", "in the second image what colour is the {}?"),
    "hop": ("what colour is the digit beside the {}?", "which colour has the digit next to the {}?"),
}
# the other types are asked in the words of these
_ABOUT_ABSENT: tuple[Literal["colour", "where", "frame"], ...] = ("colour", "where", "frame")
PHRASES["absent"] = tuple(phrase for type in _ABOUT_ABSENT for phrase in PHRASES[type])
PHRASES["turn"] = PHRASES["colour"]

ANSWERS: dict[Type, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "name": NAMES,
    "where": PLACES,
    "beside": DIGITS,
    "frame": FRAMES,
    "read": tuple(SIGNS),
    "count": tuple(NUMBERS.values()),
    "exist": ("yes", "no"),
    "point": tuple(f"{column} {row}" for row in ROWS for column in COLUMNS),
    "images": tuple(COLOURS),
    "hop": tuple(COLOURS),
    "absent": (NOTHING, *COLOURS, *PLACES, *FRAMES),
    "turn": tuple(COLOURS),
}


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: the question.
        answer: a right answer.
        type: its kind.
        boxes: (left, top, right, bottom) px of the things that the answer depends on, in the scene of the question;
            none if the answer is that a thing is absent.
        accepted: all right answers.
        turns: (question, answer) of earlier turns of the conversation.
        before: the scenes of the images that are shown before the question's scene.
    """

    text: str
    answer: str
    type: Type
    boxes: tuple[Box, ...]
    accepted: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    before: tuple[Scene, ...] = ()

    def __post_init__(self) -> None:
        """Accept the answer if no others are given."""
        object.__setattr__(self, "accepted", self.accepted or (self.answer,))


def ask(scene: Scene, type: Type, rng: np.random.Generator) -> Question:
    """Draw one question of a type; faint objects are drawn more often than bright ones."""
    if type == "images":
        return ask_second(companion(scene), scene, rng)
    phrase = _phrase(type, rng)
    if type == "read":
        (sign,) = scene.of("sign")
        return Question(phrase, sign.name, type, (sign.box,))
    if type == "count":
        digits = scene.of("digit")
        return Question(phrase, NUMBERS[len(digits)], type, tuple(thing.box for thing in digits))
    if type == "exist" and rng.integers(2):
        return Question(phrase.format(_with_article(_absent(scene, rng))), "no", type, ())
    if type == "absent":
        about = _ABOUT_ABSENT[rng.integers(len(_ABOUT_ABSENT))]
        if rng.integers(2):
            return Question(_phrase(about, rng).format(_absent(scene, rng)), NOTHING, type, ())
        question = ask(scene, about, rng)
        return Question(question.text, question.answer, type, question.boxes)
    if type in ("beside", "hop"):
        icon, digit = scene.pairs[_draw([icon for icon, _ in scene.pairs], rng)]
        answer = digit.name if type == "beside" else digit.colour
        return Question(phrase.format(icon.name), answer, type, (icon.box, digit.box))
    if type == "turn":
        return _second_turn(scene, phrase, rng)
    thing = scene.objects[_draw(scene.objects, rng)]
    if type == "point":
        points = cells(thing.box)
        answer = points[rng.integers(len(points))]
        return Question(phrase.format(thing.name), answer, type, (thing.box,), accepted=points)
    named = thing.colour if type == "name" else _with_article(thing.name) if type == "exist" else thing.name
    answers: dict[str, str] = {
        "colour": thing.colour, "name": thing.name, "where": thing.place, "frame": thing.frame, "exist": "yes"
    }  # fmt: skip
    return Question(phrase.format(named), answers[type], type, (thing.box,))


def cells(box: Box) -> tuple[str, ...]:
    """Return the points on the token grid, "x7 y3", that lie on a thing."""
    return tuple(f"{COLUMNS[cell % GRID]} {ROWS[cell // GRID]}" for cell in covered(box))


def ask_second(first: Scene, second: Scene, rng: np.random.Generator) -> Question:
    """Draw a question about the second of two scenes, about a thing that has another colour in the first."""
    things = shared(first, second)
    thing = things[_draw(things, rng)]
    return Question(_phrase("images", rng).format(thing.name), thing.colour, "images", (thing.box,), before=(first,))


def shared(first: Scene, second: Scene) -> list[Thing]:
    """Return the things of the second scene that the first has as well, in another colour."""
    colours = {thing.name: thing.colour for thing in first.objects}
    return [thing for thing in second.objects if colours.get(thing.name, thing.colour) != thing.colour]


def companion(drawn: Scene) -> Scene:
    """Return another scene of the split that shares a thing in another colour with this one."""
    for number in count(1):
        other = scene(drawn.split, drawn.index ^ number, drawn.seed)
        if shared(other, drawn):
            return other
    raise AssertionError("unreachable")


def _second_turn(scene: Scene, phrase: str, rng: np.random.Generator) -> Question:
    """Ask the colour of a thing after a first turn about the colour of another."""
    first, second = scene.objects[_draw(scene.objects, rng)], scene.objects[_draw(scene.objects, rng)]
    while second is first:
        second = scene.objects[_draw(scene.objects, rng)]
    turn = (_phrase("colour", rng).format(first.name), first.colour)
    return Question(phrase.format(second.name), second.colour, "turn", (second.box,), turns=(turn,))


def _phrase(type: Type, rng: np.random.Generator) -> str:
    return PHRASES[type][rng.integers(len(PHRASES[type]))]


def _absent(scene: Scene, rng: np.random.Generator) -> str:
    """Draw the name of a digit or an icon that the scene lacks."""
    names = DIGITS if rng.integers(2) else tuple(ICONS)
    absent = [name for name in names if name not in {thing.name for thing in scene.objects}]
    return absent[rng.integers(len(absent))]


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou8" else f"a {name}"


def _draw(things: Sequence[Thing], rng: np.random.Generator) -> int:
    """Draw the index of a thing, faint ones more often."""
    weights = np.array([1.6 - thing.opacity for thing in things])
    return int(rng.choice(len(things), p=weights / weights.sum()))
