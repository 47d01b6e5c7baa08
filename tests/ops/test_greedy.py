"""Greedy selections against their definitions, written out plainly; with the shortcuts forced to be wrong at first."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.test_ops import assert_selection, max_min_by_hand, noise, seeds, sizes
from tokensieve.measure import peak_activation_bytes
from tokensieve.ops import (
    bipartite_thinning,
    coverage,
    dpp_map,
    gram,
    greedy,
    local_variance,
    marginal_relevance,
    max_min,
    normalise,
    rank_in_group,
    rows_at,
    score,
    select,
    share_out,
)

FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few promising tokens and neighbours, so that the first look is rarely enough."""
    monkeypatch.setattr(greedy, "PROMISING", 3)
    monkeypatch.setattr(greedy, "STEPS", 4)
    monkeypatch.setattr(select, "NEIGHBOURS", 2)
    monkeypatch.setattr(score, "BLOCK", 5)


@contextmanager
def chunk(size):
    """Until the end of the block, similarity matrices of at most ``size`` rows."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (greedy, select, score):
            patch.setattr(module, "CHUNK", size)
        yield


@FEW
@given(sizes(most=20), seeds)
def test_gram_is_symmetric(size, seed):
    rows = noise(2, size[0], 6, seed=seed)
    torch.testing.assert_close(gram(rows), rows @ rows.mT)
    torch.testing.assert_close(gram(rows), gram(rows).mT, atol=1e-6, rtol=0)
    torch.testing.assert_close(gram(rows[0]), rows[0] @ rows[0].T)


# -- max_min --------------------------------------------------------------------------------------------------------


@FEW
@given(sizes(most=40), seeds, st.sampled_from([4, 7, 1000]))
def test_max_min_in_chunks_is_the_one_of_the_distance_matrix(size, seed, most):
    n, k = size
    rows = noise(2, n, 8, seed=seed)
    with chunk(most):
        assert max_min(rows, k).tolist() == [max_min_by_hand(one, k) for one in rows]


@pytest.mark.parametrize("most", [4, 1000])
@FEW
@given(seeds, st.integers(4, 20), st.data())
def test_max_min_starts_at_the_first_of_two_that_are_each_others_nearest(most, seed, n, data):
    """Both are equally far from their nearest: in exact arithmetic, so rounding must not decide."""
    near = normalise(noise(n, 8, seed=seed))
    near[:, 6:] = 0
    first, second = sorted(data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=2, unique=True)))
    rows = near + 20 * normalise(near[:1])  # a bundle of similar rows, and two far from it, nearer to each other
    rows[first], rows[second] = torch.eye(8)[6] + torch.eye(8)[7], torch.eye(8)[6] * 3
    with chunk(most):
        assert max_min(rows, 2)[0] == first
        assert max_min(rows.flip(0), 2)[0] == n - 1 - second


@FEW
@given(size=sizes(30), seed=seeds, most=st.sampled_from([4, 1024]))
def test_weighted_max_min_is_the_plain_one(size, seed, most):
    n, k = size
    assume(n > 1)
    rows, weight = noise(n, 8, seed=seed), noise(n, seed=seed + 1).abs() + 0.1
    distance = (1 - normalise(rows) @ normalise(rows).mT).fill_diagonal_(torch.inf)
    chosen = [int((distance.amin(0) * weight).argmax())]
    while len(chosen) < k:
        nearest = (distance[chosen].amin(0) * weight).index_fill(0, torch.tensor(chosen), -torch.inf)
        chosen.append(int(nearest.argmax()))
    with chunk(most):
        assert max_min(rows, k, weight).tolist() == chosen
        nothing = max_min(rows, n, torch.full((n,), torch.nan))
    assert sorted(nothing.tolist()) == list(range(n)), "of weights that are no numbers, none wins twice"


def test_max_min_of_equal_rows_goes_by_index():
    assert max_min(torch.ones(6, 4), 4).tolist() == [0, 1, 2, 3]
    assert max_min(torch.zeros(6, 4), 4).tolist() == [0, 1, 2, 3]


# -- marginal_relevance ---------------------------------------------------------------------------------------------


@FEW
@given(size=sizes(30), seed=seeds, balance=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_marginal_relevance_is_the_plain_one(size, seed, balance):
    n, k = size
    rows, relevance = noise(2, n, 8, seed=seed), noise(2, n, seed=seed + 1).sigmoid()
    for image, chosen in enumerate(marginal_relevance(rows, relevance, k, balance).tolist()):
        cosines = normalise(rows[image]) @ normalise(rows[image]).mT
        assert chosen[0] == int(relevance[image].argmax())
        for step in range(1, k):
            worth = balance * relevance[image] - (1 - balance) * cosines[chosen[:step]].amax(0)
            rest = [token for token in range(n) if token not in chosen[:step]]
            assert worth[chosen[step]] >= worth[rest].max() - 1e-6


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_marginal_relevance_selects_no_token_twice(wrong):
    rows, relevance = noise(1, 9, 4, seed=1), noise(1, 9, seed=2).sigmoid()
    rows[:, 3], rows[:, 5], relevance[:, 4] = wrong, 0, wrong
    assert sorted(marginal_relevance(rows, relevance, 9, 0.5)[0].tolist()) == list(range(9))
    equal = marginal_relevance(torch.ones(1, 5, 4), torch.ones(1, 5), 5, 0.5)
    assert equal.tolist() == [[0, 1, 2, 3, 4]], "of equals the earlier token wins"


# -- dpp_map --------------------------------------------------------------------------------------------------------


def dpp_by_hand(rows, quality, k):
    """By determinants in float64; inputs where rounding would decide are not used."""
    unit = torch.nn.functional.normalize(rows.double(), dim=-1) * quality.double()[:, None]
    kernel, chosen, before = unit @ unit.T, [], torch.zeros((), dtype=torch.float64)
    for _ in range(k):
        rest = [j for j in range(len(rows)) if j not in chosen]
        gains = torch.stack([kernel[[*chosen, j]][:, [*chosen, j]].logdet() for j in rest]) - before
        best = gains.sort(descending=True).values
        assume(len(best) == 1 or best[0] - best[1] > 1e-4)
        before = before + best[0]
        chosen.append(rest[int(gains.argmax())])
    return chosen


@FEW
@given(sizes(most=16), seeds, st.sampled_from([0.0, 0.3, 3.0]), st.sampled_from([5, 1000]))
def test_dpp_map_maximises_the_determinant(size, seed, spread, most):
    """Flat qualities, where any token may be chosen, and steep ones, where most cannot."""
    n, k = size
    rows, quality = noise(n, 20, seed=seed), (spread * noise(n, seed=seed + 1)).exp()
    with chunk(most):
        assert dpp_map(rows, quality, k).tolist() == dpp_by_hand(rows, quality, k)


@FEW
@given(sizes(most=30), seeds, st.integers(1, 4))
def test_dpp_map_never_picks_twice(size, seed, rank):
    n, k = size
    rows = noise(2, n, rank, seed=seed)
    quality = noise(2, n, seed=seed + 1).abs() * (noise(2, n, seed=seed + 2) > 0)  # half of them worthless
    assert_selection(dpp_map(rows, quality, k).sort().values, n, k)


# -- coverage -------------------------------------------------------------------------------------------------------


def coverage_by_hand(table, k, weight, bonus):
    covered, chosen = torch.zeros(table.shape[1]), []
    for _ in range(k):
        worth = weight * (table - covered).clamp(min=0).sum(-1) + bonus
        worth[chosen] = -torch.inf
        chosen.append(int(worth.argmax()))
        covered = torch.maximum(covered, table[chosen[-1]])
    return chosen


@FEW
@given(sizes(most=24), seeds, st.booleans(), st.booleans())
def test_coverage_is_the_plain_greedy_one(size, seed, as_table, few_levels):
    """With few levels of whole numbers there are ties everywhere, and sums are exact."""
    n, k = size
    table, weight = noise(2, n, 9, seed=seed), torch.ones(2, n)
    bonus = torch.zeros(2, n)
    if few_levels:
        table = (2 * table).round()
    else:
        weight, bonus = noise(2, n, seed=seed + 1).abs(), noise(2, n, seed=seed + 2).abs()
    covers = table if as_table else lambda index: table.take_along_dim(index[..., None], -2)
    order = coverage(covers, weight, k, weight, bonus)
    assert order.tolist() == [coverage_by_hand(*one[:1], k, *one[1:]) for one in zip(table, weight, bonus, strict=True)]
    assert order.tolist() == [
        coverage(one, w, k, w, b).tolist() for one, w, b in zip(table, weight, bonus, strict=True)
    ]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("most", [8, 1024])
@pytest.mark.parametrize("affected", [slice(3, 4), slice(3, 9, 2), slice(None)])
def test_tokens_stay_distinct_where_numbers_are_not_finite(bad, most, affected):
    rows, scores = noise(12, 4, seed=0), noise(12, seed=1).abs()
    rows[affected] = scores[affected] = bad
    table = normalise(rows) @ normalise(rows).T
    with chunk(most):
        selections = (
            max_min(rows, 5),
            dpp_map(rows, torch.ones(12), 5),
            dpp_map(rows, scores, 5),
            coverage(table, scores, 5, scores),
            coverage(table, scores, 5, bonus=scores),
            coverage(lambda index: table[index], scores, 5, scores),
            bipartite_thinning(rows, torch.arange(12), 5, 2),
        )
    for chosen in selections:
        assert len(set(chosen.tolist())) == len(chosen) == 5


# -- thinning -------------------------------------------------------------------------------------------------------


def thinning_by_hand(rows, order, k, step):
    cosines, order = normalise(rows) @ normalise(rows).T, order.tolist()
    while len(order) > k:
        even, odd = order[::2], order[1::2]
        alike = cosines[even][:, odd].amax(-1).tolist()
        by_similarity = [i for _, i in sorted(zip(alike, even, strict=True), key=lambda pair: -pair[0])]
        order = by_similarity[min(step, len(order) - k) :] + odd
    return order


@FEW
@given(sizes(most=40), seeds, st.integers(1, 9), st.sampled_from([6, 1000]))
def test_thinning_is_the_plain_one(size, seed, step, most):
    n, k = size
    rows = noise(2, n + 3, 5, seed=seed)
    order = torch.stack([torch.randperm(n + 3, generator=torch.Generator().manual_seed(seed + i)) for i in range(2)])
    order = order[:, :n]
    expected = [thinning_by_hand(*one, k, step) for one in zip(rows, order, strict=True)]
    with chunk(most):
        assert bipartite_thinning(rows, order, k, step).tolist() == expected


# -- others ---------------------------------------------------------------------------------------------------------


@FEW
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(2, 12), seeds)
def test_local_variance_of_long_stretches_is_that_of_the_cosines(stretches, width, seed):
    rows = noise(2, sum(stretches), width, seed=seed)
    found = torch.split(local_variance(rows, stretches), stretches, -1)
    for one, variance in zip(torch.split(normalise(rows), stretches, 1), found, strict=True):
        n = one.shape[1]
        cosines = one @ one.mT * (1 - torch.eye(n))
        mean = cosines.sum(-1, keepdim=True) / max(n - 1, 1)
        expected = (cosines - mean).square().sum(-1) / max(n - 1, 1)
        torch.testing.assert_close(variance, expected, atol=2e-5, rtol=1e-4)


@FEW
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data(), seeds)
def test_shares_add_up_and_fit(room, data, seed):
    k = data.draw(st.integers(0, sum(room)))
    weights, room = noise(3, len(room), seed=seed).clamp(min=0), torch.tensor(room)
    shares = share_out(weights, k, room)
    assert shares.sum(-1).tolist() == [k] * 3
    assert bool(((shares >= 0) & (shares <= room)).all())
    assert torch.equal(share_out(weights * 4, k, room), shares)


@FEW
@given(st.integers(1, 20), st.integers(1, 5), seeds)
def test_rank_in_group_by_hand(n, groups, seed):
    g = torch.Generator().manual_seed(seed)
    scores, group = torch.randint(0, 4, (n,), generator=g).float(), torch.randint(0, groups, (n,), generator=g)
    expected = [
        sum(int(group[j] == group[i] and (scores[j], -j) > (scores[i], -i)) for j in range(n)) for i in range(n)
    ]
    assert rank_in_group(scores, group, groups).tolist() == expected


class Waits(TorchDispatchMode):
    """Counts how often the host reads a number from the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "equal", "item")
        return func(*args, **(kwargs or {}))


def test_no_wait_per_step(monkeypatch):
    monkeypatch.undo()
    rows, k = noise(1, 300, 16, seed=0), 64
    for limit, call in (
        (0, lambda: max_min(rows, k)),
        (3, lambda: dpp_map(rows, noise(1, 300, seed=1).exp(), k)),  # wider at most twice: 128, 256, all
        (k // 4, lambda: coverage(gram(normalise(rows)), rows[..., 0], k)),
        (10, lambda: bipartite_thinning(rows, torch.arange(300)[None], k, 2)),
    ):
        with Waits() as waits:
            call()
        assert waits.count <= limit


def test_no_matrix_of_all_pairs(monkeypatch):
    """Beyond a chunk, extra memory stays well below the [N, N] matrix."""
    monkeypatch.setattr(greedy, "PROMISING", 20)
    monkeypatch.setattr(select, "NEIGHBOURS", 8)
    n, k = 1000, 8
    rows, bytes_of_all_pairs = noise(1, n, 16, seed=0), 4 * 1000**2
    unit = normalise(rows)
    with chunk(20):
        for call in (
            lambda: max_min(rows, k),
            lambda: dpp_map(rows, noise(1, n, seed=1).exp(), k),
            lambda: coverage(lambda index: rows_at(unit, index) @ unit.mT, rows[..., 0], k),
            lambda: bipartite_thinning(rows, torch.arange(n)[None], k, 50),
            lambda: local_variance(rows, [n // 2, n // 2]),
        ):
            assert peak_activation_bytes(call) < bytes_of_all_pairs / 3
