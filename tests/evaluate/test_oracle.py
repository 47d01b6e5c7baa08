"""The oracle keeps what the boxes cover."""

import pytest

from tokensieve.evaluate.oracle import oracle


def test_the_boxes_come_first_and_the_rest_is_spread():
    # a 4 x 6 grid over 60 x 40 px: the box covers tokens 8 and 9 wholly, and a tenth of 14 and 15
    found = oracle(((20, 10, 40, 21),), (60, 40), 24, (4, 6), 6)
    kept = found.kept.tolist()
    assert {8, 9, 14, 15} < set(kept)
    assert kept == sorted(kept)
    assert len(kept) == 6
    outside = [k for k in kept if k not in (8, 9, 14, 15)]
    assert outside[0] < 8 < 15 < outside[1]


def test_a_small_budget_takes_turns_between_the_boxes():
    boxes = ((0, 0, 20, 20), (40, 20, 60, 40))  # tokens 0 1 6 7 and 16 17 22 23
    assert oracle(boxes, (60, 40), 24, (4, 6), 2).kept.tolist() == [0, 16]
    assert oracle(boxes, (60, 40), 24, (4, 6), 4).kept.tolist() == [0, 1, 16, 17]


def test_the_most_covered_tokens_come_first():
    assert oracle(((19, 0, 30, 10),), (60, 40), 24, (4, 6), 1).kept.tolist() == [2]


def test_without_boxes_it_is_uniform():
    assert oracle((), (60, 40), 24, (4, 6), 3).kept.tolist() == [4, 12, 20]


def test_a_budget_of_all_tokens_keeps_all():
    assert oracle(((0, 0, 5, 5),), (60, 40), 24, (4, 6), 1.0).whole


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(ValueError, match="24 tokens have none"):
        oracle((), (60, 40), 24, None, 3)
