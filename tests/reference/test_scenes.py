"""The generator: deterministic, true to its boxes, and with nothing shared between splits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from tokensieve.reference import sources
from tokensieve.reference.questions import ANSWERS, TYPES, ask
from tokensieve.reference.scenes import CANVAS, Scene, _layout, _owner, scene
from tokensieve.reference.sources import SPLITS
from tokensieve.reference.things import Thing, covered
from tokensieve.reference.vocabulary import DIGITS


def test_same_arguments_same_scene_and_pixels() -> None:
    for index in range(5):
        one, two = scene("train", index), scene("train", index)
        assert one == two
        assert one.render().tobytes() == two.render().tobytes()
    assert scene("train", 0) != scene("train", 0, seed=1)
    assert scene("train", 0).things != scene("test", 0).things


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'dev' is unknown; use one of train, validation, test"):
        scene("dev", 0)


def test_splits_share_no_digit_instance() -> None:
    held = {split: {int(i) for name in DIGITS for i in sources.digit_instances(split, name)} for split in SPLITS}
    assert sum(len(instances) for instances in held.values()) == 1797
    assert len(set.union(*held.values())) == 1797


def test_splits_share_no_column_of_a_photograph() -> None:
    for width in (300, 741, 1411):
        strips = [sources.strip(split, width) for split in SPLITS]
        assert strips[0][0] == 0
        assert strips[-1][1] == width
        assert all(before[1] == after[0] for before, after in itertools.pairwise(strips))


def test_splits_share_no_layout() -> None:
    """Every layout has one owner, and a split draws only its own."""
    rng = np.random.default_rng(0)
    for split in SPLITS:
        assert {_owner(*_layout(split, rng)) for _ in range(100)} == {split}


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_unambiguous(split: str) -> None:
    for index in range(60):
        drawn = scene(split, index)
        assert len({thing.name for thing in drawn.objects}) == len(drawn.objects)
        assert len({thing.colour for thing in drawn.objects}) == len(drawn.objects)
        assert len(drawn.of("sign")) == 1
        for number, one in enumerate(drawn.things):
            left, top, right, bottom = one.box
            assert 0 <= left < right <= CANVAS
            assert 0 <= top < bottom <= CANVAS
            for other in drawn.things[:number]:
                gap = max(
                    max(one.box[0] - other.box[2], other.box[0] - one.box[2]),
                    max(one.box[1] - other.box[3], other.box[1] - one.box[3]),
                )
                beside = one.partner is not None and drawn.things[one.partner] is other
                assert gap <= 4 if beside else gap >= 6


def test_boxes_contain_what_is_drawn() -> None:
    """Without the asked things the picture changes inside their boxes and nowhere else."""
    for index in range(20):
        drawn = scene("test", index)
        for thing in drawn.things:
            if thing.kind == "clutter":
                continue
            rest = tuple(other for other in drawn.things if other is not thing)
            without = Scene(drawn.split, drawn.seed, index, drawn.photograph, drawn.crop, drawn.dim, rest)
            changed = (np.asarray(drawn.render()) != np.asarray(without.render())).any(-1)
            left, top, right, bottom = thing.box
            assert changed[top:bottom, left:right].sum() > 30
            changed[top:bottom, left:right] = False
            assert not changed.any()
            assert 2 <= len(covered(thing.box)) <= 8


def test_questions_have_allowed_answers_and_boxes_of_things() -> None:
    rng = np.random.default_rng(0)
    for index in range(40):
        drawn = scene("train", index)
        boxes = {thing.box for thing in drawn.things}
        for type in TYPES:
            question = ask(drawn, type, rng)
            assert question.answer in question.accepted
            assert set(question.accepted) <= set(ANSWERS[type])
            assert question.text.endswith("?")
            assert set(question.boxes) <= boxes
            assert bool(question.boxes) == (question.answer not in ("no", "nothing"))
            assert bool(question.turns) == (type == "turn")
            assert bool(question.before) == (type == "images")


def named(drawn: Scene, text: str) -> Thing | None:
    """Return the thing of a scene that a question names, apart from the scene's own account of the answer."""
    words = text.removesuffix("?").split()
    return next((thing for thing in drawn.objects if thing.name in words), None)


@pytest.mark.parametrize("split", SPLITS)
def test_a_point_lies_in_the_box_and_every_point_there_is_right(split: str) -> None:
    rng = np.random.default_rng(0)
    for index in range(60):
        drawn = scene(split, index)
        question = ask(drawn, "point", rng)
        thing = named(drawn, question.text)
        assert thing is not None
        left, top, right, bottom = thing.box
        inside = {
            f"x{x} y{y}"
            for x, y in itertools.product(range(12), range(12))
            if left <= 10 * x + 5 < right and top <= 10 * y + 5 < bottom
        }
        assert set(question.accepted) == inside
        assert len(inside) == 4


@pytest.mark.parametrize("split", SPLITS)
def test_the_second_of_two_images_decides(split: str) -> None:
    rng = np.random.default_rng(0)
    for index in range(40):
        drawn = scene(split, index)
        question = ask(drawn, "images", rng)
        (first,) = question.before
        here, there = named(drawn, question.text), named(first, question.text)
        assert here is not None
        assert there is not None
        assert question.answer == here.colour != there.colour
        assert question.boxes == (here.box,)
        assert first.split == split
        assert first.index != index


def test_two_hops_end_at_the_neighbour() -> None:
    rng = np.random.default_rng(0)
    for index in range(40):
        drawn = scene("test", index)
        question = ask(drawn, "hop", rng)
        icon = named(drawn, question.text)
        assert icon is not None
        assert icon.partner is not None
        digit = drawn.things[icon.partner]
        assert digit.kind == "digit"
        assert question.answer == digit.colour
        assert question.boxes == (icon.box, digit.box)


def test_half_of_the_premises_are_false() -> None:
    rng = np.random.default_rng(0)
    drawn = [scene("test", index % 60) for index in range(400)]
    questions = [ask(one, "absent", rng) for one in drawn]
    for one, question in zip(drawn, questions, strict=True):
        thing = named(one, question.text)
        assert (thing is None) == (question.answer == "nothing")
        assert thing is None or question.answer in (thing.colour, thing.place, thing.frame)
    assert 160 < sum(question.answer == "nothing" for question in questions) < 240


def test_the_second_turn_is_about_another_thing() -> None:
    rng = np.random.default_rng(0)
    for index in range(40):
        drawn = scene("test", index)
        question = ask(drawn, "turn", rng)
        ((text, answer),) = question.turns
        first, second = named(drawn, text), named(drawn, question.text)
        assert first is not None
        assert second is not None
        assert (answer, question.answer) == (first.colour, second.colour)
        assert first is not second
        assert question.boxes == (second.box,)
