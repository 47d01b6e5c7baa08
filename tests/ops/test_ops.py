"""Properties of the tensor maths, on drawn inputs."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d

from tests.support.oracle import area_matrix, largest_grid
from tokensieve.ops import (
    area_pool,
    attention_received,
    max_min,
    normalise,
    pooled_grid,
    text_similarity,
    top_k,
    uniform,
)

settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")
seeds = st.integers(0, 10**6)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def sizes(draw, most=60):
    """N and 1 ≤ K ≤ N."""
    n = draw(st.integers(1, most))
    return n, draw(st.integers(1, n))


def noise(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_selection(kept, n, k):
    """`[..., k]`, ascending, distinct, in range."""
    assert kept.shape[-1] == k
    assert kept.dtype == torch.int64
    assert bool((kept.diff(dim=-1) > 0).all())
    assert 0 <= int(kept.min()) <= int(kept.max()) < n


# -- top_k and uniform ----------------------------------------------------------------------------------------------


@given(sizes(), seeds, dtypes)
def test_top_k_keeps_the_largest(size, seed, dtype):
    n, k = size
    scores = noise(3, n, seed=seed, dtype=dtype)
    kept = top_k(scores, k)
    assert_selection(kept, n, k)
    for row, mine in zip(scores, kept, strict=True):
        out = torch.ones(n, dtype=torch.bool).index_fill(0, mine, False)
        assert not out.any() or row[mine].min() >= row[out].max()
        assert torch.equal(top_k(row, k), mine)


@given(sizes(), seeds, st.integers(1, 3))
def test_top_k_breaks_ties_by_index(size, seed, levels):
    n, k = size
    scores = torch.randint(0, levels, (n,), generator=torch.Generator().manual_seed(seed)).float()
    by_hand = sorted(sorted(range(n), key=lambda i: (-scores[i].item(), i))[:k])
    assert top_k(scores, k).tolist() == by_hand


@given(sizes(), seeds, st.floats(0.01, 100))
def test_top_k_ignores_scale_and_follows_permutations(size, seed, scale):
    n, k = size
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).float()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1))
    assert torch.equal(top_k(scores * scale + 3, k), top_k(scores, k))
    assert torch.equal(order[top_k(scores[order], k)].sort().values, top_k(scores, k))


@given(sizes(most=2000))
def test_uniform_is_evenly_spread(size):
    n, k = size
    kept = uniform(n, k)
    assert_selection(kept, n, k)
    gaps = kept.diff()
    assert not len(gaps) or int(gaps.max()) - int(gaps.min()) <= 1
    assert abs(int(kept[0]) - (n - 1 - int(kept[-1]))) <= 1, "as far from one end as from the other"


# -- max_min --------------------------------------------------------------------------------------------------------


def max_min_by_hand(rows, k):
    """With the whole distance matrix, in float64; inputs where rounding would decide between two rows are not used.

    Such ties are real: the two loneliest rows may be each other's nearest.
    """
    unit = torch.nn.functional.normalize(rows.double(), dim=-1)
    distance = 1 - unit @ unit.T
    nearest, chosen = (distance + 9 * torch.eye(len(rows))).amin(0), []
    while len(chosen) < k:
        best = nearest.sort(descending=True).values
        assume(len(best) == 1 or best[0] - best[1] > 1e-5)
        chosen.append(int(nearest.argmax()))
        nearest = distance[chosen].amin(0)
        nearest[chosen] = -1
    return chosen


@given(sizes(most=40), seeds)
def test_max_min_equals_the_distance_matrix(size, seed):
    n, k = size
    rows = noise(n, 8, seed=seed)
    assert max_min(rows, k).tolist() == max_min_by_hand(rows, k)


@given(sizes(most=40), seeds, st.floats(0.01, 100))
def test_max_min_ignores_lengths_and_follows_permutations(size, seed, scale):
    n, k = size
    rows, order = noise(n, 8, seed=seed), torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    chosen = max_min_by_hand(rows, k)
    assert max_min(rows * scale, k).tolist() == chosen
    assert order[max_min(rows[order], k)].tolist() == chosen


@given(sizes(most=30), seeds, st.integers(1, 3), dtypes)
def test_max_min_never_picks_twice(size, seed, distinct, dtype):
    """Duplicates and zero rows."""
    n, k = size
    pool = torch.cat([noise(distinct, 4, seed=seed), torch.zeros(1, 4)])
    rows = pool[torch.randint(0, len(pool), (n,), generator=torch.Generator().manual_seed(seed))].to(dtype)
    kept = max_min(rows, k)
    assert_selection(kept.sort().values, n, k)
    if bool(rows.any(-1).all()):  # a zero row has no direction, and no row is near it
        directions = len({tuple(r) for r in rows.tolist()})
        assert len({tuple(rows[i].tolist()) for i in kept}) == min(k, directions), "every direction before any twice"


@given(sizes(most=20), seeds)
def test_max_min_of_a_batch_is_that_of_each_row(size, seed):
    n, k = size
    rows = noise(2, 3, n, 6, seed=seed)
    assert max_min(rows, k).tolist() == [[max_min_by_hand(one, k) for one in some] for some in rows]


# -- scores ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20), seeds, dtypes)
def test_normalise(n, seed, dtype):
    rows = noise(n, 5, seed=seed, dtype=dtype)
    rows[0] = 0
    unit = normalise(rows)
    assert unit.dtype == torch.float32
    assert torch.equal(unit[0], torch.zeros(5))
    torch.testing.assert_close(unit[1:].norm(dim=-1), torch.ones(n - 1))


@given(st.integers(1, 12), st.integers(1, 6), seeds, st.sampled_from(["tokens", "prompt"]), dtypes)
def test_text_similarity_by_hand(n, words, seed, query, dtype):
    rows, text = noise(2, n, 5, seed=seed, dtype=dtype), noise(2, words, 5, seed=seed + 1, dtype=dtype)
    mask = torch.ones(2, words, dtype=torch.bool)
    mask[1, 1:] = False
    got = text_similarity(rows, text, mask, query)
    for b in range(2):
        real = text[b][mask[b]].float()
        queries = real if query == "tokens" else real.mean(0, keepdim=True)
        cosine = torch.nn.functional.cosine_similarity(rows[b].float()[:, None], queries[None], dim=-1)
        torch.testing.assert_close(got[b], cosine.amax(-1), atol=1e-5, rtol=1e-5)


# -- pooling --------------------------------------------------------------------------------------------------------

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@st.composite
def grid_and_cells(draw):
    grid = draw(grids)
    return grid, (draw(st.integers(1, grid[0])), draw(st.integers(1, grid[1])))


def dense(grid, cells):
    anchors, slot, source, weight = area_pool(grid, cells)
    matrix = torch.zeros(cells[0] * cells[1], grid[0] * grid[1])
    return anchors, matrix.index_put((slot, source), weight, accumulate=True)


@given(grid_and_cells())
def test_area_pool_averages_by_overlap(case):
    grid, cells = case
    anchors, matrix = dense(grid, cells)
    torch.testing.assert_close(matrix, area_matrix(grid, cells), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(len(matrix)))
    assert_selection(anchors, grid[0] * grid[1], cells[0] * cells[1])
    assert bool((matrix[torch.arange(len(anchors)), anchors] > 0).all()), "an anchor lies in its own cell"


@given(st.tuples(st.integers(1, 5), st.integers(1, 5)), st.integers(1, 4), st.integers(1, 4), seeds)
def test_area_pool_is_avg_pool_where_cells_divide(cells, down, across, seed):
    grid = (cells[0] * down, cells[1] * across)
    image = noise(1, 3, *grid, seed=seed)
    _, matrix = dense(grid, cells)
    pooled = (matrix @ image.flatten(2)[0].T).T.view(1, 3, *cells)
    torch.testing.assert_close(pooled, avg_pool2d(image, (down, across)), atol=1e-5, rtol=1e-5)


@given(grids, st.integers(1, 90))
def test_pooled_grid_is_the_largest(grid, k):
    cells = pooled_grid(grid, k)
    assert cells == largest_grid(grid, k)
    assert cells[0] * cells[1] <= k
    assert k < grid[0] * grid[1] or cells == grid


@pytest.mark.parametrize(
    ("grid", "k", "cells"), [((24, 24), 144, (12, 12)), ((24, 24), 192, (13, 14)), ((24, 24), 64, (8, 8))]
)
def test_pooled_grids_of_llava(grid, k, cells):
    assert pooled_grid(grid, k) == cells


@pytest.mark.parametrize("kind", ["pairs", "keys"])
def test_padding_neither_receives_nor_gives_attention(kind):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 9, 4, generator=generator) for _ in range(2))
    seen = torch.arange(9) < 6
    mask = seen.expand(1, 1, 9, 9) if kind == "pairs" else seen[None]  # the masks of sdpa and of flash kernels
    padded = attention_received(query, key, 0.5, mask)
    assert torch.allclose(padded[:, :6], attention_received(query[:, :, :6], key[:, :, :6], 0.5))
    assert not padded[:, 6:].any()
