"""Questions about a scene, their one-word answers, and the boxes of the things that an answer depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from tokensieve.reference.scenes import Scene
from tokensieve.reference.things import Box, Thing
from tokensieve.reference.vocabulary import COLOURS, DIGITS, FRAMES, ICONS, NAMES, NUMBERS, PLACES, SIGNS

if TYPE_CHECKING:
    from collections.abc import Sequence

Type = Literal["colour", "name", "where", "beside", "frame", "read", "count", "exist"]
TYPES: tuple[Type, ...] = get_args(Type)

# The named thing is the last word before the question mark. `{}` is a thing's name, or its colour.
PHRASES: dict[Type, tuple[str, ...]] = {
    "colour": ("what colour is the {}?", "what is the colour of the {}?"),
    "name": ("what is the thing in {}?", "which thing is {}?"),
    "where": ("where is the {}?", "in which corner is the {}?"),
    "beside": ("which digit is beside the {}?", "what digit is next to the {}?"),
    "frame": ("what is the frame of the {}?", "what frame is around the {}?"),
    "read": ("what does the sign say?", "which word is on the sign?"),
    "count": ("how many digits are there?", "what is the number of digits?"),
    "exist": ("is there {}?", "do you see {}?"),
}

ANSWERS: dict[Type, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "name": NAMES,
    "where": PLACES,
    "beside": DIGITS,
    "frame": FRAMES,
    "read": tuple(SIGNS),
    "count": tuple(NUMBERS.values()),
    "exist": ("yes", "no"),
}


@dataclass(frozen=True)
class Question:
    """One question. The answer depends on the `boxes` (px); there are none if it is that a thing is absent."""

    text: str
    answer: str
    type: Type
    boxes: tuple[Box, ...]


def ask(scene: Scene, type: Type, rng: np.random.Generator) -> Question:
    """Draw one question of a type; faint objects are drawn more often than bright ones."""
    phrase = PHRASES[type][rng.integers(len(PHRASES[type]))]
    if type == "read":
        (sign,) = scene.of("sign")
        return Question(phrase, sign.name, type, (sign.box,))
    if type == "count":
        digits = scene.of("digit")
        return Question(phrase, NUMBERS[len(digits)], type, tuple(thing.box for thing in digits))
    if type == "exist" and rng.integers(2):
        names = DIGITS if rng.integers(2) else tuple(ICONS)
        absent = [name for name in names if name not in {thing.name for thing in scene.objects}]
        return Question(phrase.format(_with_article(absent[rng.integers(len(absent))])), "no", type, ())
    if type == "beside":
        icon, digit = scene.pairs[_draw([icon for icon, _ in scene.pairs], rng)]
        return Question(phrase.format(icon.name), digit.name, type, (icon.box, digit.box))
    thing = scene.objects[_draw(scene.objects, rng)]
    named = thing.colour if type == "name" else _with_article(thing.name) if type == "exist" else thing.name
    answers: dict[str, str] = {
        "colour": thing.colour, "name": thing.name, "where": thing.place, "frame": thing.frame, "exist": "yes"
    }  # fmt: skip
    return Question(phrase.format(named), answers[type], type, (thing.box,))


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou8" else f"a {name}"


def _draw(things: Sequence[Thing], rng: np.random.Generator) -> int:
    """Draw the index of a thing, faint ones more often."""
    weights = np.array([1.6 - thing.opacity for thing in things])
    return int(rng.choice(len(things), p=weights / weights.sum()))
