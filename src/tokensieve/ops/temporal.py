"""Videos: T frames of n tokens each, `[..., T, n, D]`. Linear in the tokens: frames are compared at equal places."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from tokensieve.ops.merge import sizes_of
from tokensieve.ops.score import CHUNK, normalise

Segment: TypeAlias = tuple[int, int]  # first frame, and the first frame that is no longer in it


def same_place_cosine(rows: Tensor, reference: Tensor) -> Tensor:
    """Cosine of every token to the token at its place in frame ``reference[t]``, `[..., T, n, D]` to `[..., T, n]`.

    Args:
        reference: `[T]`, frame numbers.
    """
    step, found = max(1, CHUNK // rows.shape[-2]), torch.empty(rows.shape[:-1], device=rows.device)
    for first in range(0, rows.shape[-3], step):
        here, there = rows[..., first : first + step, :, :], rows[..., reference[first : first + step], :, :]
        found[..., first : first + step, :] = (normalise(here) * normalise(there)).sum(-1)
    return found


def mean_pairwise_cosine(rows: Tensor) -> Tensor:
    """Mean cosine of any two tokens at the same place of different frames, `[..., T, n, D]` to `[..., n]`, T ≥ 2."""
    total = torch.zeros_like(rows[..., 0, :, :], dtype=torch.float32)
    own = total[..., 0]
    for frames in torch.split(rows, max(1, CHUNK // rows.shape[-2]), dim=-3):
        unit = normalise(frames)
        total, own = total + unit.sum(-3), own + unit.square().sum(-1).sum(-2)
    return (total.square().sum(-1) - own) / (rows.shape[-3] * (rows.shape[-3] - 1))


def segments_at(cut: Tensor) -> list[Segment]:
    """Segments of T frames from `[T − 1]` bool, True where the next frame begins a new one."""
    edges = [0, *(number + 1 for number, new in enumerate(cut.tolist()) if new), len(cut) + 1]
    return list(pairwise(edges))


def max_static_segments(alike: Tensor) -> list[Segment]:
    """The segments with the largest sum of (places alike all through it) · (its frames − 1).

    Dynamic programming over all pairs of frames, in O(T² + T·n); of equal cuts, the one with the longest last segments.

    Args:
        alike: `[T − 1, n]` bool, whether a place looks the same in the next frame.
    """
    alike = alike.cpu().long()
    frames = len(alike) + 1
    run = torch.zeros(frames, alike.shape[1], dtype=torch.int64)  # for how many steps from here a place stays alike
    for frame in reversed(range(frames - 1)):
        run[frame] = (run[frame + 1] + 1) * alike[frame]
    ending = torch.zeros(frames, frames, dtype=torch.int64).scatter_add(1, run, torch.ones_like(run))
    steps = torch.arange(frames)
    gain = ending.flip(1).cumsum(1).flip(1) * steps  # [first frame, steps]
    best, start = torch.zeros(frames + 1, dtype=torch.int64), [0]
    for end in range(1, frames + 1):
        value = best[:end] + gain[steps[:end], end - 1 - steps[:end]]
        start.append(int(value.argmax()))
        best[end] = value[start[-1]]
    segments, end = [], frames
    while end:
        segments.append((start[end], end))
        end = start[end]
    return segments[::-1]


def still_and_moving(
    rows: Tensor, segments: list[Segment], still: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Segment]]:
    """The groups of a clip: of each segment its still places, each the mean over time, then each frame's other tokens.

    Args:
        rows: `[T, n, D]`.
        still: per segment, `[n]` bool.

    Yields:
        numbers of m tokens in the clip (still ones in the segment's first frame), their rows `[m, D]`, and the frames
        that they stand for.
    """
    size = rows.shape[1]
    for (first, end), fixed in zip(segments, still, strict=True):
        places = fixed.nonzero().squeeze(-1)
        yield places + first * size, rows[first:end].mean(0, dtype=torch.float32)[places], (first, end)
        places = (~fixed).nonzero().squeeze(-1)
        for frame in range(first, end):
            yield places + frame * size, rows[frame, places], (frame, frame + 1)


def merge_groups(
    rows: Tensor,
    segments: list[Segment],
    still: list[Tensor],
    quotas: list[int],
    pick: Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Where each token of a clip goes when every group of :func:`still_and_moving` keeps its quota.

    Args:
        quotas: per group; a group without one is dropped.
        pick: from the tokens `[m]`, rows and quota of a group, and whether it is a still one, to the member that each
            goes into (−1: none) and its weight.

    Returns:
        `[T · n]` each: the token that each goes into (itself: it stays; −1: it is dropped), and its weight.
    """
    into = torch.full(rows.shape[:2], -1, dtype=torch.int64, device=rows.device)
    weight = torch.zeros(rows.shape[:2], device=rows.device)
    flags = [flag for first, end in segments for flag in (True, *([False] * (end - first)))]
    groups = still_and_moving(rows, segments, still)
    for (tokens, members, (first, end)), quota, fixed in zip(groups, quotas, flags, strict=True):
        if quota == 0:
            continue
        target, share = pick(tokens, members, quota, fixed)
        places = tokens % rows.shape[1]
        into[first:end, places] = tokens[target].where(target >= 0, -1)
        weight[first:end, places] = share / (end - first)
    return into.flatten(), weight.flatten()


def group_sizes(segments: list[Segment], still: list[Tensor]) -> Tensor:
    """Members of each group of :func:`still_and_moving`, `[G]`."""
    sizes = []
    for (first, end), fixed in zip(segments, torch.stack(still).sum(-1).tolist(), strict=True):
        sizes += [fixed, *([len(still[0]) - fixed] * (end - first))]
    return torch.tensor(sizes)


def in_proportion(k: int, sizes: Tensor) -> Tensor:
    """``k`` shared out over groups by their ``sizes`` `[G]`, in whole numbers that add up to it, rounded along the way.

    No share is larger than its group where ``k`` is at most the sum of the sizes.
    """
    edges = sizes.cumsum(0) * k // sizes.sum().clamp(min=1)
    return edges.diff(prepend=edges.new_zeros(1))


def cluster_weights(cluster: Tensor, centres: Tensor, least: float) -> Tensor:
    """Weights `[m]` of the members of clusters, adding up to 1 in each: the centre has ``least``, or its equal share.

    The others have the rest in equal parts; ``least=0`` makes plain means.

    Args:
        cluster: `[m]`, numbers below C.
        centres: `[C]`, which member is the centre.
    """
    others = sizes_of(cluster, len(centres)) - 1
    own = (1 / (others + 1)).clamp(min=least)
    rest = (1 - own) / others.clamp(min=1)
    return rest[cluster].scatter(0, centres, own)
