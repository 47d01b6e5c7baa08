"""The question set: pinned, checked, and with honest shortcuts."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from tokensieve.reference import benchmark as module
from tokensieve.reference.benchmark import benchmark, hallucinated, questions_sha256, shortcuts
from tokensieve.reference.questions import TYPES


def test_default_test_set_is_the_published_one() -> None:
    rows = benchmark()
    assert len(rows) == len(TYPES) * module.SCENES == 3900
    assert len({row.id for row in rows}) == len(rows)
    assert questions_sha256(rows) == module.QUESTIONS_SHA256
    assert rows[0].image is rows[1].image
    assert rows[0].image.size == (120, 120)


def test_other_questions_are_refused_and_other_pixels_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIXELS_SHA256", "0")
    with pytest.warns(UserWarning, match="do not compare your numbers"):
        benchmark()
    monkeypatch.setattr(module, "QUESTIONS_SHA256", "0")
    with pytest.raises(RuntimeError, match="differs from the published one"):
        benchmark()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="scenes must be at least 1, got 0"):
        benchmark(scenes=0)
    with pytest.raises(ValueError, match="'dev' is unknown"):
        benchmark("dev", scenes=1)
    with pytest.raises(ValueError, match="question type 'size' is unknown; use some of colour"):
        benchmark(types=("size",))  # type: ignore[arg-type]


def test_a_question_does_not_depend_on_its_company() -> None:
    rows = benchmark("validation", scenes=3)
    assert set(benchmark("validation", scenes=3, types=("count",))) <= set(rows)


def test_hash_sees_every_field() -> None:
    rows = benchmark("validation", scenes=1)
    changes = {"question": "?", "answer": "x", "boxes": ((0, 0, 1, 1),), "id": "x", "accepted": ("x", "y")}
    for change in ({name: value} for name, value in (changes | {"turns": (("?", "x"),)}).items()):
        assert questions_sha256([dataclasses.replace(rows[0], **change), *rows[1:]]) != questions_sha256(rows)


def test_shortcuts_lie_between_chance_and_certainty() -> None:
    values = shortcuts(benchmark("validation", scenes=100))
    assert tuple(values) == TYPES
    for value in values.values():
        assert 0 < value.chance <= 0.5
        assert value.majority <= value.best < 0.6
    assert values["beside"].best == pytest.approx(1 / 3, abs=0.05)  # three or four digits stand beside an icon
    assert values["hop"].best == pytest.approx(1 / 3, abs=0.05)
    assert values["point"].chance == pytest.approx(4 / 144)
    assert values["images"].best == 0.5
    assert values["absent"].best == pytest.approx(max(values["absent"].majority, 1 - values["absent"].majority))


def test_a_scene_has_a_companion_whatever_the_number_of_scenes() -> None:
    rows = benchmark("validation", scenes=3, types=("images",))
    assert rows == benchmark("validation", scenes=40, types=("images",))[:3]
    assert all(len(row.scenes) == 2 and row.scenes[1] is row.scene for row in rows)


def test_hallucinations_are_answers_about_absent_things() -> None:
    rows = benchmark("validation", scenes=20, types=("absent",))
    absent = [row.answer == "nothing" for row in rows]
    assert hallucinated(rows, ["nothing"] * 20) == 0
    assert hallucinated(rows, ["red"] * 20) == 1
    texts = [
        "red" if first else row.answer
        for row, first in zip(rows, [absent.index(True) == n for n in range(20)], strict=True)
    ]
    assert hallucinated(rows, texts) == 1 / sum(absent)
