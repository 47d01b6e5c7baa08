"""Greedy selections: one token after the other, never an [N, N] matrix. Deterministic: ties go to the lower index."""

from collections.abc import Callable
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
    first = _nearest_distance(rows).argmax(-1)
    chosen, distance = [first], None
    for _ in range(k - 1):
        to_last = 1 - (rows @ _row(rows, chosen[-1])[..., None]).squeeze(-1)
        distance = to_last if distance is None else torch.minimum(distance, to_last)
        # a selected row is at distance 0 up to rounding: rule it out, so that duplicates cannot pick it again
        distance = distance.scatter(-1, chosen[-1][..., None], -torch.inf)
        chosen.append(distance.argmax(-1))
    return torch.stack(chosen, -1)


def dpp_map(rows: Tensor, quality: Tensor, k: int) -> Tensor:
    """Greedy mode of the determinantal point process with kernel ``q_i cos_ij q_j``, in the order of selection.

    Each step takes the token with the largest part outside the span of those taken (the incremental Cholesky of the
    kernel, kept as an orthonormal basis of that span): O(K·N·D) time, O(N + K·D) extra memory. When the span holds
    everything, the best quality is next.

    Args:
        rows: `[..., N, D]`.
        quality: `[..., N]`, not negative.
    """
    rows = normalise(rows) * quality.float()[..., None]
    whole = rows.square().sum(-1)
    outside, least = whole, whole * 1e-6  # below this share of a token, what is outside is rounding
    basis = rows.new_zeros((*rows.shape[:-2], k, rows.shape[-1]))
    chosen: list[Tensor] = []
    for step in range(k):
        chosen.append(torch.maximum(outside, least.where(outside > -torch.inf, outside)).argmax(-1))
        new = _row(rows, chosen[-1])[..., None, :]
        norm = new.norm(dim=-1, keepdim=True)
        for _ in range(2):  # once leaves the rounding errors of a near-duplicate, twice does not
            new = new - (new @ basis[..., :step, :].transpose(-1, -2)) @ basis[..., :step, :]
        length = new.norm(dim=-1, keepdim=True)
        unit = (new / length).where(length > 1e-3 * norm, 0)
        basis[..., step : step + 1, :] = unit
        outside = outside - (rows @ unit.transpose(-1, -2)).squeeze(-1).square()
        outside = outside.scatter(-1, chosen[-1][..., None], -torch.inf)
    return torch.stack(chosen, -1)


def coverage(
    covers: Covers, tokens: Tensor, k: int, weight: Tensor | None = None, bonus: Tensor | None = None
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
    weight = torch.ones_like(every, dtype=torch.float32) if weight is None else weight.float()
    bonus = torch.zeros_like(weight) if bonus is None else bonus.float()
    if total <= CHUNK:
        table = covers(every)
        covers = lambda index: table.take_along_dim(index[..., None], -2)  # noqa: E731
    gain = torch.cat([covers(part).clamp(min=0).sum(-1) for part in torch.split(every, CHUNK, dim=-1)], -1)
    covered = torch.zeros_like(covers(every[..., :1])).squeeze(-2)
    taken, chosen = torch.zeros_like(weight), []
    for _ in range(k):
        while True:
            near = (gain * weight + bonus + taken).topk(min(CANDIDATES, total), -1).indices
            offered = covers(near)
            gain = gain.scatter(-1, near, (offered - covered[..., None, :]).clamp(min=0).sum(-1))
            best = (gain * weight + bonus + taken).argmax(-1, keepdim=True)
            if bool((near == best).any(-1).all()):
                break
        chosen.append(best.squeeze(-1))
        column = offered.take_along_dim((near == best).int().argmax(-1)[..., None, None], -2).squeeze(-2)
        covered = torch.maximum(covered, column)
        taken = taken.scatter(-1, best, -torch.inf)
    return torch.stack(chosen, -1)


def _row(rows: Tensor, index: Tensor) -> Tensor:
    """`[..., N, D]` and `[...]` to `[..., D]`."""
    return rows.take_along_dim(index[..., None, None], dim=-2).squeeze(-2)


def _nearest_distance(rows: Tensor) -> Tensor:
    """Distance of each unit row to its nearest other row, `[..., N]`."""
    n, nearest = rows.shape[-2], []
    for start in range(0, n, CHUNK):
        cosines = rows[..., start : start + CHUNK, :] @ rows.transpose(-1, -2)
        own = torch.arange(start, min(start + CHUNK, n), device=rows.device)
        cosines[..., own - start, own] = -torch.inf
        nearest.append(1 - cosines.amax(-1))
    return torch.cat(nearest, -1)
