"""Greedy selections, one token after the other. Ties go to the lower index.

Tokens stay distinct where numbers are not finite, as in a model that overflows in half precision: a NaN would win every
maximum, and its token would be selected again and again.

The gain of a token never grows while other tokens are chosen, so a token whose old gain is below the current best need
not be updated ("lazy greedy"). On a CPU, and where the matrix of all pairs exceeds a chunk, only the most promising
tokens are updated, and their choices are valid until another token might win. On a GPU, images of a single chunk update
all tokens instead, because the check would make the host wait for the device.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from tokensieve.ops.score import CHUNK, gram, normalise, rows_at
from tokensieve.ops.select import uniform

Covers: TypeAlias = Callable[[Tensor], Tensor]
PROMISING = 128  # tokens updated at once
STEPS = 16  # choices before the first check; each later round makes a few more than were valid in the round before
TIE = 1e-6  # cosines that differ by less are equal


@torch.no_grad()
def max_min(rows: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """Select ``k`` rows by greedy max–min diversity under cosine distance, in the order of selection, `[..., k]`.

    Starts at the row farthest from its nearest neighbour (the first such row, as two mutual neighbours tie), then adds
    the row farthest from all selected rows. O(K·N·D) time after the start, which needs all pairs if no row is far from
    the others, and O(N) extra memory beyond a chunk.

    Args:
        rows: `[..., N, D]`.
        weight: `[..., N]`, multiplies the distance of a row to the others; numbers that are not positive count as tiny.
    """
    rows, lead = _flat(normalise(rows))
    total = rows.shape[1]
    factor = None if weight is None else _finite(weight.float()).reshape(rows.shape[:2]).clamp(min=1e-30)
    table = 1 - gram(rows) if total <= CHUNK else None
    if table is not None:
        table.diagonal(0, -2, -1).fill_(torch.inf)  # no row is its own neighbour
        isolation = table.amin(-1)
        table.diagonal(0, -2, -1).fill_(-torch.inf)  # a selected row is never the farthest again
    elif factor is None:
        isolation = nearest_distance(rows)
    else:  # a bound on the distance is none on the product, so that all distances are needed
        parts = torch.split(torch.arange(total, device=rows.device), CHUNK)
        isolation = torch.cat([_to_nearest_other(rows, part) for part in parts], -1)
    if factor is not None:
        isolation = isolation * factor
    tie = TIE if factor is None else 0.0
    best = (isolation >= isolation.amax(-1, keepdim=True) - tie).int().argmax(-1, keepdim=True)
    chosen, distance = [best], torch.full_like(isolation, torch.inf)
    for _ in range(k - 1):
        if table is not None:
            to_best = rows_at(table, best).squeeze(1)
        else:
            to_best = 1 - (rows @ rows_at(rows, best).transpose(-1, -2)).squeeze(-1)
            to_best.scatter_(-1, best, -torch.inf)
        distance = torch.fmin(distance, to_best)  # to the nearest selected row; fmin ignores NaN
        best = (distance if factor is None else distance * factor).argmax(-1, keepdim=True)
        chosen.append(best)
    return torch.cat(chosen, -1).view(*lead, k)


@torch.no_grad()
def weighted_max_min(rows: Tensor, weight: Tensor, k: int) -> Tensor:
    """Select ``k`` rows, each with the largest weight times cosine distance to the nearest selected one, `[B, k]`.

    The first is the row with the largest weight. O(K·N·D) time, O(N·D) extra memory.

    Args:
        rows: `[B, N, D]`.
        weight: `[B, N]`, not negative.
    """
    rows, weight = normalise(rows), _finite(weight)
    distance, taken, chosen = torch.full_like(weight, 2), torch.zeros_like(weight), []
    for _ in range(k):
        best = (weight * distance + taken).argmax(-1, keepdim=True)
        chosen.append(best)
        taken.scatter_(-1, best, -torch.inf)
        to_best = 1 - (rows @ rows_at(rows, best).transpose(-1, -2)).squeeze(-1)
        distance = torch.fmin(distance, to_best.clamp(min=0))  # fmin ignores NaN
    return torch.cat(chosen, -1)


@torch.no_grad()
def marginal_relevance(rows: Tensor, relevance: Tensor, k: int, balance: float) -> Tensor:
    """Select ``k`` rows that are relevant and differ from each other (maximal marginal relevance), in order, `[B, k]`.

    The first is the most relevant. Each other has the largest ``balance`` times relevance minus ``1 - balance`` times
    cosine to the nearest selected row. O(K·N·D) time, O(N·D) extra memory.

    Args:
        rows: `[B, N, D]`.
        relevance: `[B, N]`, in [0, 1].
    """
    rows, relevance = normalise(rows), _finite(relevance)
    score, nearest, taken, chosen = relevance, torch.full_like(relevance, -2), torch.zeros_like(relevance), []
    for _ in range(k):
        best = (score + taken).argmax(-1, keepdim=True)
        chosen.append(best)
        taken.scatter_(-1, best, -torch.inf)
        to_best = (rows @ rows_at(rows, best).transpose(-1, -2)).squeeze(-1)
        nearest = torch.fmax(nearest, to_best)  # fmax ignores NaN
        score = balance * relevance - (1 - balance) * nearest
    return torch.cat(chosen, -1)


@torch.no_grad()
def suppressed(near: Tensor, order: Tensor) -> Tensor:
    """Mark the ranks whose token is near a token of an earlier rank that is not marked, `[B, N]` bool.

    Args:
        near: `[B, N, N]` bool; True on its diagonal or not.
        order: `[B, N]`, the token of each rank.
    """
    marked = torch.zeros_like(order, dtype=torch.bool)
    by_rank = torch.empty_like(marked)
    for rank in range(order.shape[1]):
        token = order[:, rank, None]
        by_rank[:, rank, None] = token_marked = marked.gather(1, token)
        marked |= near.take_along_dim(token[..., None], 1)[:, 0] & ~token_marked
    return by_rank


def _to_nearest_other(rows: Tensor, places: Tensor) -> Tensor:
    """Return the distance of the unit rows at ``places`` `[c]` to their nearest other rows, `[B, c]`."""
    distance = 1 - rows[:, places] @ rows.transpose(-1, -2)
    itself = places[:, None] == torch.arange(rows.shape[1], device=rows.device)
    return distance.masked_fill(itself, torch.inf).amin(-1)


def nearest_distance(rows: Tensor) -> Tensor:
    """Bound the distance of each unit row `[B, N, D]` to its nearest other row, `[B, N]`; the largest one is exact.

    The distances from one row bound those of all others from above. Rows whose bound is below the largest exact
    distance are skipped. The number of rounds depends on the rows.
    """
    total = rows.shape[1]
    bound = torch.full_like(rows[..., 0], torch.inf)
    mask, largest = torch.zeros_like(bound), bound.new_full((len(rows), 1), -torch.inf)  # mask: −inf on exact rows
    chosen = uniform(total, min(total, PROMISING), rows.device).expand(len(rows), -1)
    while True:
        distance = (1 - rows_at(rows, chosen) @ rows.transpose(-1, -2)).scatter_(-1, chosen[..., None], torch.inf)
        # columns bound all rows by the chosen ones; row minima make the chosen rows exact
        bound = torch.minimum(bound, distance.amin(-2)).scatter(-1, chosen, distance.amin(-1))
        largest = torch.maximum(largest, distance.amin(-1).amax(-1, keepdim=True))
        mask.scatter_(-1, chosen, -torch.inf)
        if not bool((bound + mask >= largest - 2 * TIE).any()):
            return bound
        chosen = (bound + mask).topk(chosen.shape[-1]).indices


@torch.no_grad()
def dpp_map(rows: Tensor, quality: Tensor, k: int) -> Tensor:
    """Select ``k`` tokens by greedy MAP inference of the DPP with kernel ``q_i cos_ij q_j``, in order, `[..., k]`.

    Each step adds the token with the largest component outside the span of the selected ones, by an incremental
    Cholesky decomposition of the kernel. Once the span holds all tokens, the best quality is next. Tokens of too low
    quality to be among the first ``k`` are skipped, so that the usual time is O(N·D + K²·(D + K)).

    Args:
        rows: `[..., N, D]`.
        quality: `[..., N]`, not negative.
    """
    rows, lead = _flat(rows)
    quality = _finite(quality.float()).reshape(rows.shape[:2])
    total = rows.shape[1]
    width = total if total <= CHUNK and rows.device.type != "cpu" else min(total, 2 * k)
    order = quality.sort(dim=-1, descending=True, stable=True).indices
    while True:
        candidates = order[:, :width].sort(-1).values
        chosen, gain = _greedy_map(normalise(rows_at(rows, candidates)) * quality.gather(-1, candidates)[..., None], k)
        # a token's gain is at most its squared quality: if the last gain exceeds the next quality², no other could win
        if width == total or bool((gain > 1.00001 * quality.gather(-1, order[:, width : width + 1]).square()).all()):
            return candidates.gather(-1, chosen).view(*lead, k)
        width = min(total, 2 * width)


def _greedy_map(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Run :func:`dpp_map` on all rows `[B, m, D]` with kernel ``rows · rows``; return also the last gain, `[B, 1]`."""
    table = gram(rows) if rows.shape[1] <= CHUNK else None
    outside = _finite(rows.square().sum(-1))  # [B, m]: squared length outside the span of the selected rows
    least = outside * 1e-6 + 1e-30  # below this share of a row's length, the rest is rounding
    factors, taken = rows.new_zeros((len(rows), k, rows.shape[1])), torch.zeros_like(outside)
    chosen = []
    for step in range(k):
        # dividing by a pivot that is only rounding can overflow: fmax ignores the NaN, which would win every maximum
        gain, best = torch.fmax(outside, least).add_(taken).max(-1, keepdim=True)
        chosen.append(best)
        kernel = (rows @ rows_at(rows, best).transpose(-1, -2)).mT if table is None else rows_at(table, best)
        # the next Cholesky factor: the kernel's row, less its projection on the factors so far, over the pivot's root
        previous = factors[:, :step]
        pivot = previous.gather(-1, best[:, None].expand(-1, step, -1))
        residual = torch.baddbmm(kernel, pivot.mT, previous, alpha=-1).squeeze(1)
        factor = torch.mul(residual, gain.rsqrt(), out=factors[:, step])
        outside.addcmul_(factor, factor, value=-1)
        taken.scatter_(-1, best, -torch.inf)
    return torch.cat(chosen, -1), gain


@torch.no_grad()
def coverage(
    covers: Tensor | Covers,
    tokens: Tensor,
    k: int,
    weight: Tensor | None = None,
    bonus: Tensor | None = None,
) -> Tensor:
    """Select ``k`` of N tokens that cover R demands best (greedy facility location), in order, `[..., k]`.

    A demand is covered as well as the best selected token covers it. Each step adds the token with the largest
    ``weight * gain + bonus``. The first step computes how well each token covers each demand.

    Args:
        covers: how well each token covers each demand, `[..., N, R]`; or, if that is too large, a function from
            indices `[..., m]` to their rows, `[..., m, R]`. Negative values count as 0.
        tokens: `[..., N]`, any tensor of that shape and device.
        weight, bonus: `[..., N]`, not negative.
    """
    total = tokens.shape[-1]
    if isinstance(covers, Tensor):
        table = _finite(covers).clamp_(min=0)
        rows_of: Covers = partial(rows_at, table)
        gain = table.sum(-1)
    else:
        rows_of = partial(_finite_rows, covers)
        parts = torch.split(torch.arange(total, device=tokens.device).expand(tokens.shape), CHUNK, dim=-1)
        gain = torch.cat([rows_of(part).clamp(min=0).sum(-1) for part in parts], -1)
    weight = torch.ones_like(gain) if weight is None else _finite(weight)
    bonus = torch.zeros_like(gain) if bonus is None else _finite(bonus)
    score = gain * weight + bonus  # an upper bound of each token's current score; −inf once selected
    width = total if isinstance(covers, Tensor) and tokens.device.type != "cpu" else min(total, PROMISING)
    covered = torch.zeros_like(rows_of(torch.zeros_like(gain[..., :1], dtype=torch.int64)))
    chosen, remaining, steps = [], k, k if width == total else STEPS
    while remaining:
        order = score.sort(dim=-1, descending=True, stable=True).indices
        candidates = order[..., :width].sort(-1).values
        rows, factor = rows_of(candidates), weight.gather(-1, candidates)
        plus = bonus.gather(-1, candidates).masked_fill(score.gather(-1, candidates).isinf(), -torch.inf)
        value, place, scores, covered_after = _race(rows, covered, plus, factor, min(steps, remaining))
        pick, valid = candidates.gather(-1, place), place.shape[-1]
        if width < total:  # the choices are valid until a token outside of the candidates might have won
            rival = order[..., width : width + 1]
            limit = score.gather(-1, rival)
            lost = (value < limit) | ((value == limit) & (pick > rival))
            valid = int((~lost).int().cumprod(-1).sum(-1).min())  # leading wins, the fewest of the batch
            score = score.scatter(-1, candidates, scores[min(valid, len(scores) - 1)])
            score.scatter_(-1, pick[..., :valid], -torch.inf)
            if valid < place.shape[-1]:  # undo the choices after the last valid one
                covered_after = torch.cat([covered, rows_at(rows, place[..., :valid])], -2).amax(-2, keepdim=True)
        covered, remaining, steps = covered_after, remaining - valid, valid + STEPS // 4
        chosen.append(pick[..., :valid])
    return torch.cat(chosen, -1)


def _race(
    rows: Tensor, covered: Tensor, plus: Tensor, factor: Tensor, steps: int
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Make ``steps`` choices of :func:`coverage` among m candidates with rows `[..., m, R]`.

    Args:
        plus: `[..., m]`, the bonus; −inf on candidates that were chosen before.

    Returns:
        the score and the place of each choice, both `[..., steps]`; the scores of all candidates before each choice,
        `[..., m]`; and how well each demand is covered in the end, `[..., 1, R]`.
    """
    buffer, values, chosen, scores = torch.empty_like(rows), [], [], []
    for _ in range(steps):
        gain = torch.sub(rows, covered, out=buffer).relu_().sum(-1)
        scores.append(torch.addcmul(plus, gain, factor))
        value, best = scores[-1].max(-1, keepdim=True)
        covered = torch.maximum(covered, rows_at(rows, best))
        plus.scatter_(-1, best, -torch.inf)
        values.append(value)
        chosen.append(best)
    return torch.cat(values, -1), torch.cat(chosen, -1), scores, covered


def _finite(values: Tensor) -> Tensor:
    """Return a copy with 0 in the place of NaN and infinities."""
    return values.nan_to_num(0.0, 0.0, 0.0)


def _finite_rows(covers: Covers, index: Tensor) -> Tensor:
    return _finite(covers(index))


def _flat(rows: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Flatten the leading dimensions, `[..., N, D]` to `[B, N, D]`; return also their sizes."""
    return rows.reshape(-1, *rows.shape[-2:]), rows.shape[:-2]
