"""Decide about the images of a prompt: build what the method receives, call it, and put separators back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.budget import Budget, BudgetRule, BudgetScope, count, share_out
from tokensieve.engine.budget_scope import methods_per_image
from tokensieve.engine.handoff import EncoderOutputs
from tokensieve.engine.prompt.placeholders import equal_groups, on_device
from tokensieve.methods import Method
from tokensieve.methods.adaptive import bounds, curve
from tokensieve.models import TokenLayout
from tokensieve.models.layout import Grid
from tokensieve.ops import hash_of, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ByLayer, ConnectorTokens, Tiles, UserText


@dataclass(frozen=True)
class DecisionUnit:
    """Patches that are decided about together: a whole image, or one of its views with its share of the budget.

    Attributes:
        image: number of the image in the batch.
        rows: the patches of that image.
        grid: (height, width) of the patches, if they form a grid.
        frames: T, if the patches are a video.
        method: the method with the unit's budget.
        tiled_layout: the layout of the image, if the unit is a whole image that the vision encoder received in tiles.
    """

    image: int
    rows: slice
    grid: Grid | None
    frames: int | None
    method: Method
    tiled_layout: TokenLayout | None = None

    @property
    def size(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def batch_key(self) -> Hashable:
        """Units with equal keys are decided about in one call."""
        mosaic = None if self.tiled_layout is None else (self.tiled_layout.views, self.tiled_layout.tiles)
        return self.size, self.grid, self.frames, mosaic, self.method.budget


@dataclass(frozen=True, eq=False)
class ConnectorEvidence:
    """The rows of all images of a batch, and the evidence about them.

    Attributes:
        layouts: per image, the layout of its rows.
        features: per image `[M, D]`, the projector's rows of its patches.
        patches: per image `[M, C]`, the rows that entered the projector; empty if they were not requested.
        outputs: the record of the encode call; ``origins`` gives the number of each image in it.
        user_text: the words of every row of the batch, if they were requested; ``row_of`` gives the row of each image.
        project: the projector, from rows `[R, C]` to `[R, D]`.
        net: the net of a trained method.
    """

    layouts: list[TokenLayout]
    features: list[Tensor]
    patches: list[Tensor]
    outputs: EncoderOutputs
    origins: list[int]
    user_text: UserText | None
    row_of: list[int]
    project: Callable[[Tensor], Tensor]
    net: nn.Module | None = None

    def tokens(self, units: Sequence[DecisionUnit]) -> ConnectorTokens:
        """Return the tokens of equal units, `[B, N, D]`."""
        first, outputs = units[0], self.outputs
        origins = [(self.origins[unit.image], unit.rows) for unit in units]
        by_layer: dict[str, Any] = {
            name: ByLayer(
                {layer: torch.stack([rows[image][part] for image, part in origins]) for layer, rows in layers.items()},
                outputs.depth,
            )
            for name, layers in outputs.by_layer.items()
        }
        similarity, hashes, beside = outputs.cls_similarity, outputs.pixel_hashes, outputs.rows_beside
        return ConnectorTokens(
            torch.stack([self.features[unit.image][unit.rows] for unit in units]),
            grid=first.grid,
            frames=first.frames,
            budget=first.method.image_budget(first.size),
            notes=outputs.notes,
            cls_similarity=torch.stack([similarity[image][part] for image, part in origins]) if similarity else None,
            patches=torch.stack([self.patches[unit.image][unit.rows] for unit in units]) if self.patches else None,
            project=self.project,
            rows_beside=torch.stack([beside[image] for image, _ in origins]) if beside else None,
            # the views of one image are told apart by their first row
            pixel_hash=torch.stack([hash_of(hashes[i]) + part.start for i, part in origins]) if hashes else None,
            user_text=self._text_of(units),
            tiles=_tiles_of(units),
            net=self.net and self.net.to(self.features[first.image].device),
            **by_layer,
        )

    def _text_of(self, units: Sequence[DecisionUnit]) -> UserText | None:
        if self.user_text is None:
            return None
        rows = on_device([self.row_of[unit.image] for unit in units], self.user_text.mask.device)
        return UserText(self.user_text.features[rows], self.user_text.mask[rows])


def decide(
    method: Method,
    scope: BudgetScope,
    evidence: ConnectorEvidence,
    samples: Sequence[Sequence[int]],
    budgets: Sequence[int] | None = None,
) -> list[Reduction]:
    """Return the method's decision about the rows of each image, all images in order.

    Args:
        scope: the scope of the budget.
        samples: `[sample][image]`, the number of patches of each image.
        budgets: the tokens to keep of each image, where ``keep`` is a rule.
    """
    if budgets is not None:
        decisions = _decide_units([method.with_budget(budget) for budget in budgets], scope, evidence)
        return [layout.merge_parts(parts) for layout, parts in zip(evidence.layouts, decisions, strict=True)]
    methods = methods_per_image(method, scope, samples)
    if scope == "sample-score" and method.budget is not None:
        ranked = _decide_units([method.with_budget(1)] * len(evidence.layouts), scope, evidence)  # only for its scores
        scores = (torch.cat(list(map(scores_of, decisions))) for decisions in ranked)
        shares = [share_by_score(method.budget, [next(scores) for _ in sizes]) for sizes in samples]
        methods = [[method.with_budget(share) for share in row] for row in shares]
    decisions = _decide_units([of_image for row in methods for of_image in row], scope, evidence)
    return [layout.merge_parts(parts) for layout, parts in zip(evidence.layouts, decisions, strict=True)]


def curves_of(rule: BudgetRule, method: Method, evidence: ConnectorEvidence) -> list[list[float]]:
    """Return the curve of each image that a threshold cuts; see ``methods/adaptive.py``.

    Each image is read alone: its number of tokens then does not depend on the others in the batch, to the last bit.
    """
    curves, method_of_one = [], method.with_budget(1)  # the budget plays no part
    for image, layout in enumerate(evidence.layouts):
        unit = DecisionUnit(image, slice(0, layout.patches), layout.stacked, layout.frames, method_of_one)
        most = bounds(rule.wanted, layout.patches)[1]
        curves.append(curve(rule.criterion, evidence.tokens([unit]), method, most))
    heights = iter(torch.cat(curves).tolist())  # one transfer from the device for all images
    return [list(islice(heights, len(image_curve))) for image_curve in curves]


def _decide_units(methods: Sequence[Method], scope: BudgetScope, evidence: ConnectorEvidence) -> list[list[Reduction]]:
    """Return the decisions about the units of each image; each image has its own method."""
    images = enumerate(zip(evidence.layouts, methods, strict=True))
    units = [unit for image, (layout, method) in images for unit in units_of(image, layout, method, scope)]
    decisions: dict[int, Reduction] = {}
    for group in equal_groups([unit.batch_key for unit in units]):
        members = [units[number] for number in group]
        decisions |= dict(zip(group, members[0].method(evidence.tokens(members)), strict=True))
    per_image: list[list[Reduction]] = [[] for _ in evidence.layouts]
    for number, unit in enumerate(units):
        per_image[unit.image].append(decisions[number])
    for image, parts in enumerate(per_image):
        if any(part.rows is not None for part in parts) and len(parts) > 1:
            sizes = [part.total for part in parts]
            views = zip(parts, torch.split(evidence.features[image], sizes), strict=True)
            # a view that stays whole beside others has the projector's rows
            per_image[image] = [v if v.rows is not None else replace(v, rows=v.apply(rows)) for v, rows in views]
    return per_image


def units_of(image: int, layout: TokenLayout, method: Method, scope: BudgetScope) -> list[DecisionUnit]:
    """Return the units of one image: its views if the scope or a method for grids requires it, else the whole image."""
    sizes = list(map(prod, layout.views))
    budget_per_view = scope == ("frame" if layout.video else "tile")
    by_view = len(sizes) > 1 and (budget_per_view or method.needs.requests("grid"))
    keep = method.budget
    stays_whole = keep is not None and count(keep, layout.patches) == layout.patches
    if not by_view or (stays_whole and not budget_per_view):
        tiled_layout = None if layout.tile is None else layout
        return [DecisionUnit(image, slice(0, layout.patches), layout.stacked, layout.frames, method, tiled_layout)]
    methods = [method] * len(sizes)
    if keep is not None and not budget_per_view:
        methods = [method.with_budget(share) for share in share_out(keep, sizes)]
    starts = [sum(sizes[:view]) for view in range(len(sizes))]
    return [
        DecisionUnit(image, slice(start, start + size), grid, None, of_view)
        for start, size, grid, of_view in zip(starts, sizes, layout.views, methods, strict=True)
    ]


def with_separators(decision: Reduction, layout: TokenLayout, features: Tensor) -> Reduction:
    """Return a decision whose rows a net made with the rows of its separators, which no net makes.

    Args:
        features: `[N, D]`, the rows that were decided about.
    """
    if decision.rows is None or layout.separator is None:
        return decision
    at_slots = layout.separator[decision.anchors][:, None]
    return replace(decision, rows=features[decision.anchors].where(at_slots, decision.rows))


def scores_of(decision: Reduction) -> Tensor:
    """Return the scores that the tokens of an image were ranked by, `[N]`; zeros for an image that was kept whole."""
    if decision.scores is None and not decision.whole:
        raise ValueError("a method that declares by_score must give its scores to image.keep()")
    return torch.zeros(decision.total, device=decision.anchors.device) if decision.scores is None else decision.scores


def share_by_score(keep: Budget, scores: Sequence[Tensor]) -> list[int]:
    """Share a budget out over images, by the number of the best of all ``scores`` `[N]` that each image holds.

    The shares are exact in sum, and at least 1 each: fewer tokens than images leave one each. Of equal scores the
    earlier ranks higher.
    """
    if not scores:
        return []  # a prompt without an image
    # each image's best token gets the highest rank of all, so that no image is left without one
    with_best = [row.float().scatter(0, row.argmax(0, keepdim=True), torch.inf) for row in scores]
    joined, sizes = torch.cat(with_best), list(map(len, scores))
    best = top_k(joined, max(count(keep, len(joined)), len(scores)))
    in_best = torch.split(torch.zeros_like(joined).index_fill(0, best, 1), sizes)
    return [int(n) for n in torch.stack([part.sum() for part in in_best]).tolist()]


def _tiles_of(units: Sequence[DecisionUnit]) -> Tiles | None:
    layouts = [unit.tiled_layout for unit in units]
    first = layouts[0]
    if first is None:
        return None
    numbers = [layout.tile for layout in layouts if layout is not None and layout.tile is not None]
    return Tiles(torch.stack(numbers), first.tiles, first.views)
