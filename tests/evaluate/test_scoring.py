"""Metrics and intervals against values computed by hand or published."""

import numpy as np
import pytest

from tokensieve.evaluate import METRICS, bootstrap, wilson
from tokensieve.evaluate.scoring import interval, normalise


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


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Newcombe 1998, table I, method 3 (score without continuity correction)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(successes, total, low, high):
    assert wilson(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap_of_one_run_is_near_the_normal_interval():
    scores = np.random.default_rng(1).random((1, 400))
    half = 1.96 * scores.std() / 20
    assert bootstrap(scores) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.004)


def test_bootstrap_includes_the_variance_of_the_seeds():
    agreeing, apart = np.full((3, 400), 0.5), np.repeat([[0.3], [0.5], [0.7]], 400, axis=1)
    assert bootstrap(agreeing) == (0.5, 0.5)
    low, high = bootstrap(apart)
    assert low < 0.35
    assert high > 0.65


def test_the_interval_of_all_right_or_all_wrong_has_a_width():
    assert interval(np.zeros((3, 20))) == wilson(0, 20)
    assert interval(np.ones((1, 20))) == wilson(20, 20)
    assert interval(np.array([[1.0, 0, 1, 1]])) == wilson(3, 4)
