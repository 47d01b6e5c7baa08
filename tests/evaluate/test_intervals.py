"""Intervals against published values, and their coverage."""

import numpy as np
import pytest

from tokensieve.evaluate import wilson
from tokensieve.evaluate.intervals import interval


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Newcombe 1998, table I, method 3 (score without continuity correction)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(successes, total, low, high):
    assert wilson(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_all_right_or_all_wrong_has_a_width():
    alone = np.arange(20)
    assert interval(np.zeros((3, 20)), alone) == wilson(0, 20)
    assert interval(np.ones((1, 20)), alone) == wilson(20, 20)
    assert interval(np.array([[1.0, 0, 1, 1]]), np.arange(4)) == wilson(3, 4)
