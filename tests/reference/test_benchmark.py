"""The question set: pinned, checked, and with honest shortcuts."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from tokensieve.reference import benchmark as module
from tokensieve.reference.benchmark import benchmark, questions_sha256, shortcuts
from tokensieve.reference.questions import TYPES


def test_default_test_set_is_the_published_one() -> None:
    rows = benchmark()
    assert len(rows) == 8 * module.SCENES == 2400
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


def test_hash_sees_every_field() -> None:
    rows = benchmark("validation", scenes=1)
    for change in ({"question": "?"}, {"answer": "x"}, {"boxes": ((0, 0, 1, 1),)}, {"id": "x"}):
        assert questions_sha256([dataclasses.replace(rows[0], **change), *rows[1:]]) != questions_sha256(rows)


def test_shortcuts_lie_between_chance_and_certainty() -> None:
    values = shortcuts(benchmark("validation", scenes=100))
    assert tuple(values) == TYPES
    for value in values.values():
        assert 0 < value.chance <= 0.5
        assert value.majority <= value.best < 0.6
    assert values["beside"].best == pytest.approx(1 / 3, abs=0.05)  # three or four digits stand beside an icon
