"""Metrics against values computed by hand or published."""

import pytest

from tokensieve.evaluate import METRICS
from tokensieve.evaluate.metrics import normalise


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Red cup.", "red cup"),
        ("Three", "3"),
        ("top-left", "top-left"),
        ("A", "a"),  # a choice, not an article
        ("it's 2.5!", "it's 2.5"),
        ("...", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal


def test_exact():
    assert METRICS["exact"]("A red cup.", ["mug", "red cup"]) == 1
    assert METRICS["exact"]("red", ["red cup"]) == 0


def test_contains_matches_whole_words():
    assert METRICS["contains"]("It is the red cup, I think", ["Red cup"]) == 1
    assert METRICS["contains"]("hundred", ["red"]) == 0
    assert METRICS["contains"]("anything", ["..."]) == 0


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_of_ten_annotators(agreeing, accuracy):
    # the values of the official evaluation: leave one annotator out, min(1, agreeing / 3), average
    answers = ["cup"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert METRICS["vqa"]("Cup", answers) == pytest.approx(accuracy)


def test_vqa_of_few_annotators():
    assert METRICS["vqa"]("cup", ["cup"]) == 1
    assert METRICS["vqa"]("cup", ["mug"]) == 0
    assert METRICS["vqa"]("cup", ["cup", "mug"]) == pytest.approx(0.5)
