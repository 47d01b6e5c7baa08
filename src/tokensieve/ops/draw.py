"""Random numbers that depend on an image's pixels alone, not on its place in a batch or on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# splitmix64 (Steele, Lea and Flood, 2014), its constants as signed 64-bit integers: torch has no unsigned arithmetic
STEP = -7046029254386353131
MULTIPLIERS = (-4658895280553007687, -7723592293110705685)


def pixel_hash(pixels: Tensor) -> Tensor:
    """Return a number that depends on every pixel and its place, `[...]` to `[]` int64, by :func:`hash_of`.

    An image has the same hash when a batch pads it with zeros at the end of an axis.
    """
    rows = pad(pixels.detach().float(), (0, pixels.shape[-1] % 2))
    return hash_of(rows.contiguous().view(torch.int64))  # two float32 in one integer: no copy, half the products


def hash_of(numbers: Tensor) -> Tensor:
    """Return a number that depends on every number and its place, int64 `[...]` to `[]`; zeros add nothing.

    All steps are integer arithmetic that wraps around, which gives the same result on every device and in every order.
    """
    for axis in range(numbers.ndim):
        # every place along the last axis has an odd weight of its own; the axis is summed away
        places = torch.arange(numbers.shape[-1], device=numbers.device)
        numbers = (numbers * (mix(places + (axis << 32)) | 1)).sum(-1)
    return mix(numbers)


def mix(numbers: Tensor) -> Tensor:
    """Scramble 64-bit integers so that neighbours differ in about half of their bits; one to one."""
    x = numbers * STEP + STEP
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        x = (x ^ _shift_right(x, shift)) * multiplier
    return x ^ _shift_right(x, 31)


def random_scores(keys: Tensor, total: int, seed: int = 0) -> Tensor:
    """Return ``total`` random int64 numbers per key: `[B]` to `[B, total]`. Equal keys and seeds give equal numbers."""
    # seed, key and place are mixed one after another: keys or seeds that differ by a few must not give shifted copies
    keyed = mix(mix(torch.full_like(keys, seed)) ^ keys)
    return mix(keyed[:, None] + torch.arange(total, device=keys.device))


def _shift_right(numbers: Tensor, bits: int) -> Tensor:
    """Shift as unsigned integers: the bits that the sign would fill in are cleared."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
