"""Greedy selections: one token after the other, never an [N, N] matrix. Deterministic: ties go to the lower index."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from tokensieve.ops.score import CHUNK, normalise

Covers: TypeAlias = Callable[[Tensor], Tensor]
CANDIDATES = 16  # tokens whose gain is brought up to date at once


def max_min(rows: Tensor, k: int) -> Tensor:
    """Greedy max–min diversity under cosine distance, in the order of selection, `[..., k]`.

    Starts at the row farthest from its nearest neighbour, then adds the row farthest from everything selected.
    O(K·N·D) time after the start and O(N) extra memory: a running minimum, never a distance matrix.

    Args:
        rows: `[..., N, D]`.
    """
    rows = normalise(rows)
    cosines = rows @ rows.transpose(-1, -2) if rows.shape[-2] <= CHUNK else None  # a single chunk is kept
    first = _nearest_distance(rows, cosines).argmax(-1)
    chosen, distance = [first], None
    for _ in range(k - 1):
        alike = (rows @ _row(rows, chosen[-1])[..., None]).squeeze(-1) if cosines is None else _row(cosines, chosen[-1])
        distance = 1 - alike if distance is None else torch.minimum(distance, 1 - alike)
        # a selected row is at distance 0 up to rounding: rule it out, so that duplicates cannot pick it again
        distance = distance.scatter(-1, chosen[-1][..., None], -torch.inf)
        chosen.append(distance.argmax(-1))
    return torch.stack(chosen, -1)


def dpp_map(rows: Tensor, quality: Tensor, k: int) -> Tensor:
    """Greedy mode of the determinantal point process with kernel ``q_i cos_ij q_j``, in the order of selection.

    Each step takes the token with the largest part outside the span of those taken, by the incremental Cholesky
    decomposition of the kernel: O(K·N·(D + K)) time, O(K·N) extra memory. When the span holds everything, the best
    quality is next.

    Args:
        rows: `[..., N, D]`.
        quality: `[..., N]`, not negative.
    """
    rows = normalise(rows) * quality.float()[..., None]
    kernel = rows @ rows.transpose(-1, -2) if rows.shape[-2] <= CHUNK else None  # a single chunk is kept
    outside = rows.square().sum(-1)
    least = outside * 1e-6  # below this share of a token, what is outside is rounding
    factors = rows.new_zeros((*rows.shape[:-2], k, rows.shape[-2]))
    chosen: list[Tensor] = []
    for step in range(k):
        best = torch.maximum(outside, least.where(outside > -torch.inf, outside)).argmax(-1, keepdim=True)
        chosen.append(best.squeeze(-1))
        like = (rows @ _row(rows, chosen[-1])[..., None]).squeeze(-1) if kernel is None else _row(kernel, chosen[-1])
        so_far = factors[..., :step, :]
        mine = so_far.gather(-1, best[..., None, :].expand(*so_far.shape[:-1], 1))
        own, floor = outside.gather(-1, best), least.gather(-1, best)
        factor = (like - (mine.transpose(-1, -2) @ so_far).squeeze(-2)) / own.clamp(min=1e-30).sqrt()
        factor = factor.where(own > floor, 0)
        factors[..., step, :] = factor
        outside = (outside - factor.square()).scatter(-1, best, -torch.inf)
    return torch.stack(chosen, -1)


def coverage(
    covers: Covers,
    tokens: Tensor,
    k: int,
    weight: Tensor | None = None,
    bonus: Tensor | None = None,
) -> Tensor:
    """Greedy facility location: cover R demands best with ``k`` of N tokens, in the order of selection, `[..., k]`.

    A demand is covered as well as the best chosen token covers it. Each step takes the token with the largest
    ``weight * gain + bonus``. Gains only ever fall, so they are brought up to date lazily, ``CANDIDATES`` tokens at a
    time: the same choices as by looking at all of them, without their [R, N] matrix.

    Args:
        covers: from indices `[..., m]` to how well these tokens cover each demand, `[..., m, R]`; below 0 counts as 0.
        tokens: `[..., N]`, any tensor of that shape and device.
        weight, bonus: `[..., N]`, not negative.
    """
    total, every = tokens.shape[-1], torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
    if total <= CHUNK:
        table = covers(every)
        covers = partial(rows_at, table)

    def value(gain: Tensor, index: Tensor) -> Tensor:
        gain = gain if weight is None else gain * weight.gather(-1, index)
        return gain if bonus is None else gain + bonus.gather(-1, index)

    parts = [covers(part).clamp(min=0).sum(-1) for part in torch.split(every, CHUNK, dim=-1)]
    score = value(torch.cat(parts, -1), every)  # never below what a token is worth now
    covered, chosen = torch.zeros_like(covers(every[..., :1])).squeeze(-2), []
    best = score.argmax(-1, keepdim=True)
    for _ in range(k):
        while True:
            # the best by score is among them: each round it stays the best, or falls
            near = torch.cat([best, score.topk(min(CANDIDATES, total), -1).indices], -1)
            offered = covers(near)
            gain = (offered - covered[..., None, :]).clamp_(min=0).sum(-1)
            score = score.scatter(-1, near, value(gain, near).where(score.gather(-1, near) > -torch.inf, -torch.inf))
            best = score.argmax(-1, keepdim=True)
            place = near == best
            if bool(place.any(-1).all()):
                break
        chosen.append(best.squeeze(-1))
        covered = torch.maximum(covered, _row(offered, place.int().argmax(-1)))
        score = score.scatter(-1, best, -torch.inf)
        best = score.argmax(-1, keepdim=True)
    return torch.stack(chosen, -1)


def _row(rows: Tensor, index: Tensor) -> Tensor:
    """`[..., N, D]` and `[...]` to `[..., D]`."""
    return rows_at(rows, index[..., None]).squeeze(-2)


def rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """`[..., N, D]` and `[..., m]` to `[..., m, D]`."""
    return rows.gather(-2, index[..., None].expand(*index.shape, rows.shape[-1]))


def _nearest_distance(rows: Tensor, cosines: Tensor | None) -> Tensor:
    """Distance of each unit row to its nearest other row, `[..., N]`; ``cosines`` may be known."""
    nearest = []
    for start in range(0, rows.shape[-2], CHUNK):
        chunk = rows[..., start : start + CHUNK, :] @ rows.transpose(-1, -2) if cosines is None else cosines.clone()
        chunk.diagonal(start, -2, -1).fill_(-torch.inf)
        nearest.append(1 - chunk.amax(-1))
    return torch.cat(nearest, -1)
