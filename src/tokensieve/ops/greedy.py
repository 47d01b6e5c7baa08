"""Greedy selections: one token after the other. Deterministic: ties go to the lower index.

What a token is still worth only ever falls while others are chosen. So one that was worth less before than the best is
now need not be looked at again: on a CPU, and wherever the matrix of all pairs is larger than a chunk, only the most
promising tokens are brought up to date, and the choices among them count until another token might have won. On a GPU,
images of a single chunk are decided without that check, so that the host never waits.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from tokensieve.ops.score import CHUNK, gram, normalise, rows_at
from tokensieve.ops.select import uniform

Covers: TypeAlias = Callable[[Tensor], Tensor]
PROMISING = 128  # tokens brought up to date at once
STEPS = 16  # choices among them before the first check; later a few more than counted before
TIE = 1e-6  # cosines are equal to this


@torch.no_grad()
def max_min(rows: Tensor, k: int) -> Tensor:
    """Greedy max–min diversity under cosine distance, in the order of selection, `[..., k]`.

    Starts at the row farthest from its nearest neighbour (of rows equally far, as two that are each other's nearest
    can be, the first), then adds the row farthest from everything selected. O(K·N·D) time after the start, which needs
    all pairs where no row is far from the others, and O(N) extra memory beyond a chunk.

    Args:
        rows: `[..., N, D]`.
    """
    rows, lead = _flat(normalise(rows))
    total = rows.shape[1]
    table = 1 - gram(rows) if total <= CHUNK else None
    if table is not None:
        table.diagonal(0, -2, -1).fill_(torch.inf)
        alone = table.amin(-1)
        table.diagonal(0, -2, -1).fill_(-torch.inf)  # what is selected is never the farthest again
    else:
        alone = nearest_distance(rows)
    best = (alone >= alone.amax(-1, keepdim=True) - TIE).int().argmax(-1, keepdim=True)
    chosen, distance = [best], torch.full_like(alone, torch.inf)
    for _ in range(k - 1):
        if table is not None:
            near = rows_at(table, best).squeeze(1)
        else:
            near = 1 - (rows @ rows_at(rows, best).transpose(-1, -2)).squeeze(-1)
            near.scatter_(-1, best, -torch.inf)
        distance = torch.minimum(distance, near)
        best = distance.argmax(-1, keepdim=True)
        chosen.append(best)
    return torch.cat(chosen, -1).view(*lead, k)


def nearest_distance(rows: Tensor) -> Tensor:
    """Distance of each unit row `[B, N, D]` to its nearest other row, `[B, N]`: exact for the largest of them.

    Each row looked at bounds that distance for all others, and those that cannot have the largest any more are never
    looked at. The number of rounds depends on the rows.
    """
    total = rows.shape[1]
    bound = torch.full_like(rows[..., 0], torch.inf)
    unseen, largest = torch.zeros_like(bound), bound.new_full((len(rows), 1), -torch.inf)
    near = uniform(total, min(total, PROMISING), rows.device).expand(len(rows), -1)
    while True:
        distance = (1 - rows_at(rows, near) @ rows.transpose(-1, -2)).scatter_(-1, near[..., None], torch.inf)
        bound = torch.minimum(bound, distance.amin(-2)).scatter(-1, near, distance.amin(-1))
        largest = torch.maximum(largest, distance.amin(-1).amax(-1, keepdim=True))
        unseen.scatter_(-1, near, -torch.inf)
        if not bool((bound + unseen >= largest - 2 * TIE).any()):
            return bound
        near = (bound + unseen).topk(near.shape[-1]).indices


@torch.no_grad()
def dpp_map(rows: Tensor, quality: Tensor, k: int) -> Tensor:
    """Greedy mode of the determinantal point process with kernel ``q_i cos_ij q_j``, in the order of selection.

    Each step takes the token with the largest part outside the span of those taken, by the incremental Cholesky
    decomposition of the kernel. When the span holds everything, the best quality is next. Tokens of such low quality
    that they cannot be among the first ``k`` are left out, so that the usual time is O(N·D + K²·(D + K)).

    Args:
        rows: `[..., N, D]`.
        quality: `[..., N]`, not negative.
    """
    rows, lead = _flat(rows)
    quality = quality.float().reshape(rows.shape[:2])
    total = rows.shape[1]
    wide = total if total <= CHUNK and rows.device.type != "cpu" else min(total, 2 * k)
    order = quality.sort(dim=-1, descending=True, stable=True).indices
    while True:
        near = order[:, :wide].sort(-1).values
        chosen, least = _greedy_map(normalise(rows_at(rows, near)) * quality.gather(-1, near)[..., None], k)
        if wide == total or bool((least > 1.00001 * quality.gather(-1, order[:, wide : wide + 1]).square()).all()):
            return near.gather(-1, chosen).view(*lead, k)
        wide = min(total, 2 * wide)


def _greedy_map(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`dpp_map` of all of `[B, m, D]` with kernel ``rows · rows``, and what the last was worth, `[B, 1]`."""
    table = gram(rows) if rows.shape[1] <= CHUNK else None
    outside = rows.square().sum(-1)
    least = outside * 1e-6 + 1e-30  # below this share of a token, what is outside is rounding
    factors, gone = rows.new_zeros((len(rows), k, rows.shape[1])), torch.zeros_like(outside)
    chosen = []
    for step in range(k):
        worth, best = torch.maximum(outside, least).add_(gone).max(-1, keepdim=True)
        chosen.append(best)
        like = (rows @ rows_at(rows, best).transpose(-1, -2)).mT if table is None else rows_at(table, best)
        so_far = factors[:, :step]
        mine = so_far.gather(-1, best[:, None].expand(-1, step, -1))
        left = torch.baddbmm(like, mine.mT, so_far, alpha=-1).squeeze(1)
        factor = torch.mul(left, worth.rsqrt(), out=factors[:, step])
        outside.addcmul_(factor, factor, value=-1)
        gone.scatter_(-1, best, -torch.inf)
    return torch.cat(chosen, -1), worth


@torch.no_grad()
def coverage(
    covers: Tensor | Covers,
    tokens: Tensor,
    k: int,
    weight: Tensor | None = None,
    bonus: Tensor | None = None,
) -> Tensor:
    """Greedy facility location: cover R demands best with ``k`` of N tokens, in the order of selection, `[..., k]`.

    A demand is covered as well as the best chosen token covers it. Each step takes the token with the largest
    ``weight * gain + bonus``. The first needs how well every token covers every demand.

    Args:
        covers: how well each token covers each demand, `[..., N, R]`; or where that is too large, a function from
            indices `[..., m]` to their rows, `[..., m, R]`. Below 0 counts as 0.
        tokens: `[..., N]`, any tensor of that shape and device.
        weight, bonus: `[..., N]`, not negative.
    """
    total = tokens.shape[-1]
    offer: Covers = partial(rows_at, covers) if isinstance(covers, Tensor) else covers
    if isinstance(covers, Tensor):
        gain = covers.clamp(min=0).sum(-1)
    else:
        parts = torch.split(torch.arange(total, device=tokens.device).expand(tokens.shape), CHUNK, dim=-1)
        gain = torch.cat([covers(part).clamp(min=0).sum(-1) for part in parts], -1)
    weight = torch.ones_like(gain) if weight is None else weight
    bonus = torch.zeros_like(gain) if bonus is None else bonus
    score = gain * weight + bonus  # never below what a token is worth now
    wide = total if isinstance(covers, Tensor) and tokens.device.type != "cpu" else min(total, PROMISING)
    covered = torch.zeros_like(offer(torch.zeros_like(gain[..., :1], dtype=torch.int64)))
    chosen, left, steps = [], k, k if wide == total else STEPS
    while left:
        order = score.sort(dim=-1, descending=True, stable=True).indices
        near = order[..., :wide].sort(-1).values
        offered, factor = offer(near), weight.gather(-1, near)
        plus = bonus.gather(-1, near).masked_fill(score.gather(-1, near).isinf(), -torch.inf)
        value, place, worths, now = _race(offered, covered, plus, factor, min(steps, left))
        pick, sure = near.gather(-1, place), place.shape[-1]
        if wide < total:  # the choices count until a token that was not looked at might have won
            rival = order[..., wide : wide + 1]
            limit = score.gather(-1, rival)
            lost = (value < limit) | ((value == limit) & (pick > rival))
            sure = int((~lost).int().cumprod(-1).sum(-1).min())
            score = score.scatter(-1, near, worths[min(sure, len(worths) - 1)])
            score.scatter_(-1, pick[..., :sure], -torch.inf)
            if sure < place.shape[-1]:
                now = torch.cat([covered, rows_at(offered, place[..., :sure])], -2).amax(-2, keepdim=True)
        covered, left, steps = now, left - sure, sure + STEPS // 4
        chosen.append(pick[..., :sure])
    return torch.cat(chosen, -1)


def _race(
    offered: Tensor, covered: Tensor, plus: Tensor, factor: Tensor, steps: int
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """``steps`` choices of :func:`coverage` among m tokens that offer `[..., m, R]`; ``plus`` is −inf where gone.

    Returns:
        what each choice was worth and its place, both `[..., steps]`; what all tokens were worth before each choice,
        `[..., m]`; and what is covered in the end, `[..., 1, R]`.
    """
    room, values, places, worths = torch.empty_like(offered), [], [], []
    for _ in range(steps):
        gain = torch.sub(offered, covered, out=room).relu_().sum(-1)
        worths.append(torch.addcmul(plus, gain, factor))
        value, best = worths[-1].max(-1, keepdim=True)
        covered = torch.maximum(covered, rows_at(offered, best))
        plus.scatter_(-1, best, -torch.inf)
        values.append(value)
        places.append(best)
    return torch.cat(values, -1), torch.cat(places, -1), worths, covered


def _flat(rows: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """`[..., N, D]` as `[B, N, D]`, and what the leading dimensions were."""
    return rows.reshape(-1, *rows.shape[-2:]), rows.shape[:-2]
