"""The one-sided bound, the chances that order a race, and the number of questions that a proof needs."""

import numpy as np
import pytest
from scipy.stats import binom, norm

from tokensieve.evaluate.intervals import tango
from tokensieve.tune.statistics import CORRECTION, Z, chance, drop_of, fewest, needed, surely_worse

ALONE = np.arange(400)  # each question has an image of its own


def scores(lost: int, gained: int, total: int = 400) -> tuple[np.ndarray, np.ndarray]:
    full, reduced = np.full(total, 1.0), np.full(total, 1.0)
    reduced[:lost] = 0
    full[lost : lost + gained] = 0
    return full, reduced


def test_the_quantile_is_one_sided():
    assert pytest.approx(norm.ppf(0.95)) == Z


def test_a_drop_counts_questions_that_both_have_answered():
    full, reduced = scores(12, 4)
    reduced[-10:] = np.nan
    drop = drop_of(full, reduced, ALONE)
    assert (drop.lost, drop.gained, drop.questions) == (12, 4, 390)
    assert drop.mean == pytest.approx(8 / 390)
    assert drop.accuracy == pytest.approx(378 / 390)
    assert drop.mean < drop.high < 0.05


def test_no_drop_is_a_positive_zero():
    full, reduced = scores(0, 0)
    assert f"{drop_of(full, reduced, np.arange(len(full))).mean:.2%}" == "0.00%"


@pytest.mark.parametrize(("changed", "true_drop"), [(0.04, 0.01), (0.08, 0.02), (0.02, 0.02), (0.1, 0.0)])
def test_the_bound_covers_the_true_drop_in_95_of_100_samples(changed, true_drop):
    random, covered = np.random.default_rng(5), []
    lose, win = (changed + true_drop) / 2, (changed - true_drop) / 2
    for _ in range(600):
        kind = random.choice(3, size=400, p=[lose, win, 1 - changed])
        full, reduced = np.where(kind == 1, 0.0, 1.0), np.where(kind == 0, 0.0, 1.0)
        covered.append(drop_of(full, reduced, ALONE).high >= true_drop)
    assert np.mean(covered) > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 600)


def test_images_with_many_questions_widen_the_bound():
    full, reduced = scores(20, 0)
    assert drop_of(full, reduced, ALONE // 10).high > 1.3 * drop_of(full, reduced, ALONE).high


@pytest.mark.parametrize("bound", [0.005, 0.01, 0.02, 0.05])
def test_fewest_is_the_number_that_proves_the_bound_without_any_change(bound):
    count = fewest(bound)
    high = {n: drop_of(np.ones(n), np.ones(n), np.arange(n)).high for n in (count - 1, count)}
    assert high[count] <= bound < high[count - 1]


def test_needed_questions_prove_the_bound_four_times_out_of_five():
    full, reduced = scores(8, 4, 1000)
    drop = drop_of(full, reduced, np.arange(1000))
    assert drop.high > 0.01 > drop.mean
    count = needed(drop, 0.01)
    assert count is not None
    assert count > 1000
    random = np.random.default_rng(0)
    proven = []
    for _ in range(200):
        kind = random.choice(3, size=count, p=[0.008, 0.004, 0.988])
        new = drop_of(np.where(kind == 1, 0.0, 1.0), np.where(kind == 0, 0.0, 1.0), np.arange(count))
        proven.append(new.high <= 0.01)
    assert 0.7 < np.mean(proven) < 0.95


def test_no_number_of_questions_proves_a_bound_below_the_drop():
    assert needed(drop_of(*scores(20, 4), ALONE), 0.02) is None


def test_a_chance_follows_the_drop_and_the_questions():
    mild, bad = scores(4, 2), scores(40, 4)
    assert chance(*mild, 2000, 0.05) > 0.95
    assert chance(*bad, 2000, 0.05) < 0.05
    assert chance(*mild, 2000, 0.02) > chance(*mild, 200, 0.02)
    assert surely_worse(*bad, 0.05)
    assert not surely_worse(*mild, 0.001)


@pytest.mark.parametrize("bound", [0.01, 0.02, 0.05])
def test_a_true_drop_at_the_bound_is_proven_in_at_most_5_of_100_samples(bound):
    """Exact, over all outcomes: even where hardly an answer changes, and at the least number of questions."""
    for total in sorted({round(fewest(bound) * share) for share in (1, 1.1, 1.3, 1.6, 2, 3, 5)}):
        for gain in (0, bound / 10, bound / 2, bound):
            loss = bound + gain
            lost, gained = np.meshgrid(
                *(np.arange(int(total * rate + 6 * np.sqrt(total * rate) + 5)) for rate in (loss, gain))
            )
            chances = binom.pmf(lost, total, loss) * binom.pmf(gained, total - lost, gain / (1 - loss))
            low, _ = tango(gained, lost + CORRECTION, np.full_like(lost, total), z=Z)
            assert chances[-low <= bound].sum() <= 0.05


def test_a_bound_counts_a_share_of_a_question_as_lost():
    low, _ = tango(4, 12 + CORRECTION, 400, z=Z)
    # one more question that differs, of 16, is part of the estimate of the effective number
    assert drop_of(*scores(12, 4), ALONE).high == pytest.approx(-low, rel=0.02)
    uncorrected, _ = tango(4, 12, 400, z=Z)
    assert drop_of(*scores(12, 4), ALONE).high > -uncorrected
