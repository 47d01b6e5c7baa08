"""Hashes of pixels, and random numbers from them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from tokensieve.ops import hash_of, pixel_hash, random_scores, top_k

FEW = settings(deadline=None, derandomize=True, database=None)


@FEW
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_any_change_of_a_pixel_changes_the_hash_and_padding_does_not(seed, channels, height, width):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randn(channels, height, width, generator=g)
    assert pixel_hash(pad(pixels, (0, 3, 0, 2))) == pixel_hash(pixels)
    assert pixel_hash(pixels.bfloat16()) == pixel_hash(pixels.bfloat16().float())
    changed = pixels.clone()
    changed.view(-1)[seed % pixels.numel()] += 1
    assert pixel_hash(changed) != pixel_hash(pixels)
    moved = pixels.roll(1, -1)
    assert torch.equal(moved, pixels) or pixel_hash(moved) != pixel_hash(pixels)


def test_axes_count_and_memory_layout_does_not():
    pixels = torch.randn(3, 5, 5)
    assert pixel_hash(pixels.transpose(1, 2)) != pixel_hash(pixels)
    assert pixel_hash(pixels.transpose(1, 2).contiguous().transpose(1, 2)) == pixel_hash(pixels)
    assert hash_of(torch.tensor([1, 2])) != hash_of(torch.tensor([2, 1]))


def test_places_are_uniform_and_pairs_of_places_independent():
    """Chi-square over 20,000 draws of 5 of 20 places: each place, and each pair of places, equally often."""
    draws = 20_000
    keys = torch.randint(2**62, (draws,), generator=torch.Generator().manual_seed(0))
    kept = top_k(random_scores(keys, 20), 5)
    chosen = torch.zeros(draws, 20).scatter(1, kept, 1)
    pairs = chosen.T @ chosen
    expected = draws * 5 / 20
    spread = draws * 5 / 20 * 15 / 20  # variance of a count
    # the places of a draw are negatively dependent: the sum of squares is chi-square with 19 degrees, times 20 / 19
    statistic = float((pairs.diagonal() - expected).square().sum() / spread * 19 / 20)
    assert 6.8 < statistic < 38.6  # 0.5 % and 99.5 % quantiles
    together = pairs[torch.triu(torch.ones(20, 20), 1).bool()] / draws
    share = 5 / 20 * 4 / 19
    assert float((together - share).abs().max()) < 5 * (share / draws) ** 0.5


def test_neighbouring_keys_and_seeds_share_no_more_than_chance():
    kept = top_k(random_scores(torch.arange(2000), 100), 25)
    chosen = torch.zeros(2000, 100).scatter(1, kept, 1)
    shared = (chosen[1:] * chosen[:-1]).sum(-1)
    assert abs(float(shared.mean()) - 25 / 4) < 0.3
    assert not (kept[1:] == kept[:-1]).all(-1).any()
