"""Videos of T frames with n tokens each, `[..., T, n, D]`; linear time, as frames are compared at equal places."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from tokensieve.ops.merge import sizes_of
from tokensieve.ops.score import CHUNK, normalise
from tokensieve.ops.select import top_k

Segment: TypeAlias = tuple[int, int]  # first frame, and the first frame after the segment


def same_place_cosine(rows: Tensor, reference: Tensor) -> Tensor:
    """Return the cosine of each token to its place in frame ``reference[t]``, `[..., T, n, D]` to `[..., T, n]`.

    Args:
        reference: `[T]`, frame numbers.
    """
    step, cosines = max(1, CHUNK // rows.shape[-2]), torch.empty(rows.shape[:-1], device=rows.device)
    for first in range(0, rows.shape[-3], step):
        frames, others = rows[..., first : first + step, :, :], rows[..., reference[first : first + step], :, :]
        cosines[..., first : first + step, :] = (normalise(frames) * normalise(others)).sum(-1)
    return cosines


def mean_pairwise_cosine(rows: Tensor) -> Tensor:
    """Average the cosines of all pairs of frames at each place, `[..., T, n, D]` to `[..., n]`, T ≥ 2."""
    # the squared length of the sum of unit rows is the sum of all their cosines, those of rows to themselves included
    total = torch.zeros_like(rows[..., 0, :, :], dtype=torch.float32)
    itself = total[..., 0]
    for frames in torch.split(rows, max(1, CHUNK // rows.shape[-2]), dim=-3):
        unit = normalise(frames)
        total, itself = total + unit.sum(-3), itself + unit.square().sum(-1).sum(-2)
    return (total.square().sum(-1) - itself) / (rows.shape[-3] * (rows.shape[-3] - 1))


def nearest_in_previous(rows: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Find the most similar token of the previous frame for each token, anywhere in the picture.

    Args:
        rows: `[T, n, D]`.
        free: `[T, n]` bool; the other tokens neither look for one nor are found.

    Returns:
        The cosine, −1 in the first frame and for tokens that are not free, and the index of the token among all T · n,
        both `[T, n]`.
    """
    frames, size = free.shape
    cosine, place = torch.full(free.shape, -1.0, device=rows.device), torch.zeros_like(free, dtype=torch.int64)
    step = max(1, CHUNK // size)  # frames at once
    for first in range(1, frames, step):
        current, before = slice(first, first + step), slice(first - 1, min(first + step, frames) - 1)
        table = normalise(rows[current]) @ normalise(rows[before]).mT
        cosine[current], place[current] = table.masked_fill(~free[before, None], -1).max(-1)
    start = (torch.arange(frames, device=rows.device) - 1).clamp(min=0) * size  # of the previous frame
    return cosine.masked_fill(~free, -1), start[:, None] + place


def segments_at(cut: Tensor) -> list[Segment]:
    """Return the segments of T frames from `[T − 1]` bool, True where the next frame starts a segment."""
    edges = [0, *(frame + 1 for frame, new in enumerate(cut.tolist()) if new), len(cut) + 1]
    return list(pairwise(edges))


def changing_segments(rows: Tensor, threshold: float, least: int) -> list[Segment]:
    """Cut a video `[T, n, D]` where the means of consecutive frames have a cosine below ``threshold``.

    The video is also cut where the cosines are lowest, until there are ``least`` segments.
    """
    mean = normalise(rows.mean(1, dtype=torch.float32))
    cosine = (mean[1:] * mean[:-1]).sum(-1)
    return segments_at((cosine < threshold).scatter(0, top_k(-cosine, least - 1), True))


def max_static_segments(static: Tensor) -> list[Segment]:
    """Cut a video into the segments with the largest sum of (places static throughout) · (frames − 1).

    Uses dynamic programming over all pairs of frames in O(T² + T·n) time. Among equal cuts the one with the longest
    last segments wins.

    Args:
        static: `[T − 1, n]` bool, whether a place looks the same in the next frame.
    """
    static = static.cpu().long()
    frames = len(static) + 1
    run = torch.zeros(
        frames, static.shape[1], dtype=torch.int64
    )  # steps from each frame on for which a place is static
    for frame in reversed(range(frames - 1)):
        run[frame] = (run[frame + 1] + 1) * static[frame]
    # [first frame, steps]: places with a run of exactly that length; the reversed cumsum makes it "at least"
    exact = torch.zeros(frames, frames, dtype=torch.int64).scatter_add(1, run, torch.ones_like(run))
    steps = torch.arange(frames)
    gain = exact.flip(1).cumsum(1).flip(1) * steps
    # best[e]: the largest sum for the first e frames; start[e]: first frame of its last segment
    best, start = torch.zeros(frames + 1, dtype=torch.int64), [0]
    for end in range(1, frames + 1):
        value = best[:end] + gain[steps[:end], end - 1 - steps[:end]]
        start.append(int(value.argmax()))
        best[end] = value[start[-1]]
    segments, end = [], frames
    while end:  # follow the last segments back to frame 0
        segments.append((start[end], end))
        end = start[end]
    return segments[::-1]


def still_and_moving(
    rows: Tensor, segments: list[Segment], still: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Segment]]:
    """Split a clip into groups: per segment the still places averaged over time, then the moving tokens of each frame.

    Args:
        rows: `[T, n, D]`.
        still: per segment, `[n]` bool.

    Yields:
        indices of m tokens in the clip (still ones: in the segment's first frame), their rows `[m, D]`, and the frames
        that they represent.
    """
    size = rows.shape[1]
    for (first, end), is_still in zip(segments, still, strict=True):
        places = is_still.nonzero().squeeze(-1)
        yield places + first * size, rows[first:end].mean(0, dtype=torch.float32)[places], (first, end)
        places = (~is_still).nonzero().squeeze(-1)
        for frame in range(first, end):
            yield places + frame * size, rows[frame, places], (frame, frame + 1)


def merge_groups(
    rows: Tensor,
    segments: list[Segment],
    still: list[Tensor],
    quotas: list[int],
    pick: Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Merge the tokens of a clip so that each group of :func:`still_and_moving` keeps its quota.

    Args:
        quotas: tokens to keep per group; a group with quota 0 is dropped.
        pick: receives the tokens `[m]`, rows and quota of a group and whether it is still; returns the member that each
            token merges into (−1: it is dropped) and its weight.

    Returns:
        `[T · n]` each: the token that each token merges into (itself: it is kept; −1: it is dropped), and its weight.
    """
    into = torch.full(rows.shape[:2], -1, dtype=torch.int64, device=rows.device)
    weight = torch.zeros(rows.shape[:2], device=rows.device)
    flags = [flag for first, end in segments for flag in (True, *([False] * (end - first)))]
    groups = still_and_moving(rows, segments, still)
    for (tokens, members, (first, end)), quota, is_still in zip(groups, quotas, flags, strict=True):
        if quota == 0:
            continue
        target, share = pick(tokens, members, quota, is_still)
        places = tokens % rows.shape[1]  # a still place is written in all frames of its segment, with equal weights
        into[first:end, places] = tokens[target].where(target >= 0, -1)
        weight[first:end, places] = share / (end - first)
    return into.flatten(), weight.flatten()


def group_sizes(segments: list[Segment], still: list[Tensor]) -> Tensor:
    """Count the members of each group of :func:`still_and_moving`, `[G]`."""
    sizes = []
    for (first, end), count in zip(segments, torch.stack(still).sum(-1).tolist(), strict=True):
        sizes += [count, *([len(still[0]) - count] * (end - first))]
    return torch.tensor(sizes)


def in_proportion(k: int, sizes: Tensor) -> Tensor:
    """Split ``k`` over groups in proportion to their ``sizes`` `[G]`, into whole numbers that add up to ``k``.

    Cumulative shares are rounded, so no share exceeds its group if ``k`` is at most the sum of the sizes.
    """
    edges = sizes.cumsum(0) * k // sizes.sum().clamp(min=1)
    return edges.diff(prepend=edges.new_zeros(1))


def cluster_weights(cluster: Tensor, centres: Tensor, least: float) -> Tensor:
    """Weight the members of clusters, `[m]`, to sum to 1 per cluster: at least ``least`` for the centre.

    The other members share the remainder equally; ``least=0`` makes plain means.

    Args:
        cluster: `[m]`, cluster number of each member.
        centres: `[C]`, index of the member at the centre of each cluster.
    """
    others = sizes_of(cluster, len(centres)) - 1
    of_centre = (1 / (others + 1)).clamp(min=least)
    of_other = (1 - of_centre) / others.clamp(min=1)
    return of_other[cluster].scatter(0, centres, of_centre)
