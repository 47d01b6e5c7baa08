"""Budgets that fit each image: bounds, steps, the average on the calibrated images, and the curves."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokensieve import Refusal, parse
from tokensieve.budget import BudgetRule, budget_text, count, parse_budget, rule_of
from tokensieve.methods.adaptive import CURVES, SPREAD, bounds, curve, cut, threshold_for
from tokensieve.tokens import ByLayer, ConnectorTokens

shares = st.floats(0.02, 1.0)
wanted = st.one_of(st.integers(1, 80), shares)


@st.composite
def images(draw, n=12):
    """Falling curves of images with unequal sizes and amounts of content, and a rule."""
    totals = draw(st.lists(st.integers(4, 200), min_size=n, max_size=n))
    keep = draw(wanted)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    curves = []
    for total in totals:
        rate = float(torch.rand((), generator=generator)) * 20 / total
        noise = 1 + 0.01 * torch.rand(bounds(keep, total)[1], generator=generator)
        curves.append((torch.exp(-rate * torch.arange(len(noise))) * noise).cummin(0).values.tolist())
    return BudgetRule("average", keep), curves, totals


@given(wanted, st.integers(1, 400), st.lists(st.floats(0, 1), max_size=60), st.floats(0, 1))
def test_counts_lie_within_bounds_on_steps(keep, total, worth, threshold):
    least, most, step = bounds(keep, total)
    tokens, average = cut(worth, threshold, keep, total), count(keep, total)
    assert 1 <= least <= tokens <= most <= total
    assert least <= average <= most <= SPREAD * average
    assert tokens % step == 0 or tokens == most
    assert (average < total) or tokens == total


@given(wanted, st.integers(1, 400), st.lists(st.floats(0, 1), max_size=60), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_keeps_no_more(keep, total, worth, one, other):
    low, high = sorted((one, other))
    assert cut(worth, high, keep, total) <= cut(worth, low, keep, total)


def mean_at(rule, curves, totals):
    threshold = threshold_for(rule, curves, totals)
    kept = [cut(one, threshold, rule.wanted, total) for one, total in zip(curves, totals, strict=True)]
    return sum(kept) / len(kept)


@settings(deadline=None)
@given(images())
def test_the_average_is_met_within_a_step(case):
    rule, curves, totals = case
    asked = sum(count(rule.wanted, total) for total in totals) / len(totals)
    step = sum(bounds(rule.wanted, total)[2] for total in totals) / len(totals)
    assert abs(mean_at(rule, curves, totals) - asked) <= step


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(4, 60), st.integers(4, 60))
def test_a_larger_target_keeps_more(seed, one, other):
    generator = torch.Generator().manual_seed(seed)
    curves = [torch.rand(240, generator=generator).sort(descending=True).values.tolist() for _ in range(16)]
    low, high = sorted((one, other))
    few, many = (
        mean_at(BudgetRule("average", keep), [row[: bounds(keep, 240)[1]] for row in curves], [240] * 16)
        for keep in (low, high)
    )
    assert few <= many + bounds(low, 240)[2] + bounds(high, 240)[2]  # each average is met within a step


def test_equal_flat_curves_are_refused():
    with pytest.raises(Refusal, match="an average of 16 tokens is out of reach on these 8 images by 'gain'"):
        threshold_for(BudgetRule("average", 16), [[0.5] * 64] * 8, [144] * 8)


def tokens_of(rows, attention=None):
    layers = {} if attention is None else dict.fromkeys(range(4), attention)
    return ConnectorTokens(rows, cls_attention=ByLayer(layers, 4))


def scattered(distinct, total=48, seed=0):
    """One image of ``total`` tokens with so many different contents."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(distinct, 64, generator=generator)
    return rows[torch.arange(total) % distinct][None]


@pytest.mark.parametrize("criterion", ["gain", "rank"])
def test_more_content_is_worth_more_tokens(criterion):
    method = parse("divprune")[0]
    few, many = (curve(criterion, tokens_of(scattered(distinct)), method, 40) for distinct in (3, 24))
    assert int((few >= 0.9 * many[15]).sum()) < int((many >= 0.9 * many[15]).sum())


def test_the_gain_is_that_of_the_greedy_cover_by_hand():
    rows = scattered(9, 20, seed=3)
    cosines = torch.nn.functional.normalize(rows[0], dim=-1)
    cosines = (cosines @ cosines.T).clamp(min=0)
    covered, gains = torch.zeros(20), []
    for _ in range(12):
        after = [torch.maximum(covered, row).mean() for row in cosines]
        best = int(torch.stack(after).argmax())
        gains.append(float(after[best] - covered.mean()))
        covered = torch.maximum(covered, cosines[best])
    worth = curve("gain", tokens_of(rows), parse("uniform")[0], 12)
    assert worth.tolist() == pytest.approx(gains, abs=1e-5)
    assert worth[9:].abs().max() < 1e-5  # nine contents are covered by nine tokens


def test_the_mass_is_what_the_best_tokens_still_miss():
    scores = torch.tensor([[0.5, 0.1, 0.3, 0.2, 0.1]])  # above the lowest: .4 0 .2 .1 0, in shares 4/7 0 2/7 1/7 0
    worth = curve("mass", tokens_of(torch.zeros(1, 5, 4), scores), parse("vtc-cls(first_layer=-2)")[0], 4)
    assert worth.tolist() == pytest.approx([1, 3 / 7, 1 / 7, 0], abs=1e-6)


def test_the_rank_of_equal_tokens_is_one_and_of_orthogonal_ones_their_number():
    method = parse("uniform")[0]
    assert curve("rank", tokens_of(torch.ones(1, 8, 16)), method, 4)[0] == pytest.approx(1, abs=0.02)
    assert curve("rank", tokens_of(torch.eye(8)[None]), method, 4).tolist() == pytest.approx([8, 4, 8 / 3, 2], abs=1e-3)


@pytest.mark.parametrize("criterion", CURVES)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_curves_of_damaged_rows_are_finite_or_keep_the_least(criterion, value):
    rows = scattered(8)
    rows[0, :3] = value
    scores = torch.rand(1, 48)
    scores[0, :3] = value
    worth = curve(criterion, tokens_of(rows, scores), parse("vtc-cls(first_layer=-2)")[0], 40)
    assert 4 <= cut(worth.tolist(), 0.01, 16, 48) <= 40


def test_a_method_without_scores_has_no_mass():
    with pytest.raises(Refusal, match="'mass' goes by the scores of a method, and divprune has none"):
        curve("mass", tokens_of(scattered(4)), parse("divprune")[0], 8)


@given(st.sampled_from(["layers", "average"]), wanted, st.sampled_from(["gain", "mass", "rank"]), st.floats(0, 9))
def test_rules_are_read_back(mean, keep, criterion, threshold):
    rule = BudgetRule("layers", keep) if mean == "layers" else BudgetRule("average", keep, criterion, threshold)
    assert rule_of(str(rule)) == rule
    assert rule_of(parse_budget(str(rule))) == rule
    (method,) = parse("scope", keep=str(rule))
    assert parse(str(method)) == [method]


@pytest.mark.parametrize(
    ("text", "shown"),
    [("average:64", "average:64:gain"), ("average:11%:mass:0.25", "average:11%:mass"), ("layers:25%", "layers:25%")],
)
def test_a_rule_is_shown_without_its_threshold(text, shown):
    assert budget_text(text) == shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean:64", "a budget in words is 'layers:64'"),
        ("average:", "tokens or a share in (0, 1]; got ''"),
        ("average:0", "a share in (0, 1]; got 0"),
        ("layers:64:gain", "a budget in words is"),
        ("average:64:gian", "unknown criterion 'gian'; did you mean gain"),
        ("average:64:gain:low", "the threshold must be a number of at least 0; got 'low'"),
        ("average:64:gain:nan", "the threshold must be a number of at least 0; got 'nan'"),
        ("average:64:gain:1:2", "a budget in words is"),
    ],
)
def test_other_words_are_refused(text, message):
    with pytest.raises(Refusal, match=re.escape(message)):
        parse("scope", keep=text)


def test_outside_of_a_model_a_rule_is_refused():
    tokens = dataclasses.replace(tokens_of(scattered(8)))
    with pytest.raises(Refusal, match="is worked out for each image of a model"):
        parse("divprune(keep='average:8:gain:0.1')")[0](tokens)
