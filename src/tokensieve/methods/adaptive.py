"""Budgets that fit each image: the curve of its worth, cut at one threshold, gives the number of tokens.

A curve ``worth[k]`` never rises and says what the token k + 1 of an image is worth. The image keeps as many tokens as
its curve has entries at or above the threshold, as a multiple of a step and within bounds. One threshold for all images
makes images of much content keep more than others. It is calibrated, so that the counts have the wanted average.
The number depends on the image, its method and the threshold alone: never on the other images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokensieve.budget import BudgetRule, Criterion, Number, count
from tokensieve.errors import Refusal
from tokensieve.methods.base import Method, ScoreMethod
from tokensieve.ops import CHUNK, coverage, gram, normalise, rows_at
from tokensieve.tokens import ConnectorTokens

SPREAD = 4  # an image keeps at least a fourth, and at most four times the average
STEPS = 8  # counts are multiples of an eighth of the average
HALVINGS = 60  # of the interval of thresholds: more than a float32 can tell apart


def bounds(mean: Number, total: int) -> tuple[int, int, int]:
    """Return (least, most, step): the counts that an image of ``total`` tokens may have under this average."""
    average = count(mean, total)
    step, most = max(1, round(average / STEPS)), min(total, SPREAD * average)
    if average == total:
        return total, total, step  # an image of no more tokens than the average stays whole, as with a number
    return step * -(-average // (SPREAD * step)), most, step


def curve(criterion: Criterion, image: ConnectorTokens, method: Method, most: int) -> Tensor:
    """Return what each of the first ``most`` tokens of one image is worth, `[most]` float32; the curve never rises.

    Args:
        image: the tokens of one image, `[1, N, D]`.

    Raises:
        Refusal: for "mass", a method without scores.
    """
    if criterion == "mass" and not isinstance(method, ScoreMethod):
        raise Refusal(f"'mass' goes by the scores of a method, and {method.info.name} has none: use 'gain' or 'rank'")
    return CURVES[criterion](image, method, most).cummin(-1).values


def _gain(image: ConnectorTokens, method: Method, most: int) -> Tensor:
    """Return the share of the image's patches that each further token covers, chosen greedily (facility location)."""
    rows = normalise(image.features)

    def cosines_of(index: Tensor) -> Tensor:
        return rows_at(rows, index) @ rows.mT

    order = coverage(gram(rows) if image.total <= CHUNK else cosines_of, rows[..., 0], most)
    covered = cosines_of(order)[0].clamp(min=0).cummax(0).values.mean(-1)  # [most], after each choice
    return covered.diff(prepend=covered.new_zeros(1))


def _mass(image: ConnectorTokens, method: Method, most: int) -> Tensor:
    """Return the share of the score mass that is still missing before each token; the lowest score counts as zero."""
    assert isinstance(method, ScoreMethod)
    scores = method.score(image)[0].float().nan_to_num(0.0, 0.0, 0.0)
    mass = (scores - scores.amin()).sort(descending=True).values
    mass = mass / mass.sum() if bool(mass.any()) else torch.full_like(mass, 1 / len(mass))
    return (1 - (mass.cumsum(0) - mass))[:most]


def _rank(image: ConnectorTokens, method: Method, most: int) -> Tensor:
    """Return the effective rank of the features over the number of tokens, 1 to ``most`` (AgilePruner's measure)."""
    rows = normalise(image.features)[0].nan_to_num(0.0, 0.0, 0.0)  # LAPACK refuses what is not finite
    squares = torch.linalg.eigvalsh(rows @ rows.mT if len(rows) <= rows.shape[1] else rows.mT @ rows)
    values = squares.clamp(min=0).sqrt()  # the singular values
    entropy = torch.special.entr(values / values.sum().clamp(min=1e-12)).sum()
    worth: Tensor = entropy.exp() / torch.arange(1, most + 1, device=rows.device)
    return worth


CURVES: dict[str, Callable[[ConnectorTokens, Method, int], Tensor]] = {"gain": _gain, "mass": _mass, "rank": _rank}


def cut(worth: Sequence[float], threshold: float, mean: Number, total: int) -> int:
    """Return the number of tokens of an image of ``total`` tokens whose curve is ``worth``."""
    least, most, step = bounds(mean, total)
    above = sum(value >= threshold for value in worth)
    return min(max(step * round(above / step), least), most)


def threshold_for(rule: BudgetRule, curves: Sequence[Sequence[float]], totals: Sequence[int]) -> float:
    """Return the threshold at which the counts of these images average to what the rule asks for.

    Args:
        curves: per image, :func:`curve`.
        totals: per image, the number of its tokens.

    Raises:
        Refusal: the average is missed by more than one step, because the curves of many images are equal or flat.
    """
    target = sum(count(rule.wanted, total) for total in totals)

    def missed(threshold: float) -> int:
        kept = (cut(worth, threshold, rule.wanted, total) for worth, total in zip(curves, totals, strict=True))
        return sum(kept) - target

    low, high = 0.0, max(map(max, curves)) * 1.01 + 1e-12
    for _ in range(HALVINGS):  # bisection: counts fall as the threshold rises
        middle = (low + high) / 2
        low, high = (middle, high) if missed(middle) > 0 else (low, middle)
    best = min((high, low), key=lambda threshold: abs(missed(threshold)))
    steps = sum(bounds(rule.wanted, total)[2] for total in totals)
    if abs(missed(best)) > steps:
        mean = (missed(best) + target) / len(totals)
        raise Refusal(
            f"an average of {target / len(totals):.4g} tokens is out of reach on these {len(totals)} images by "
            f"{rule.criterion!r}: the nearest is {mean:.4g}, because their curves are equal or flat there"
        )
    return best
