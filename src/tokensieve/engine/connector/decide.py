"""What a method decides about at once: an image, or each of its views, each with its share of the budget."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from tokensieve.budget import Budget, count, share_out
from tokensieve.budget import Scope as Scope
from tokensieve.engine.prompt.placeholders import equal_groups
from tokensieve.errors import Refusal
from tokensieve.methods import Method
from tokensieve.models import TokenLayout
from tokensieve.models.layout import Grid
from tokensieve.ops import top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens

AnyMethod = TypeVar("AnyMethod", bound=Method)


@dataclass(frozen=True)
class DecisionUnit:
    """Some patches of an image, and who decides about them.

    Attributes:
        image: which image of the batch.
        where: which of its patches.
        grid: (height, width) of these, if they form one.
        frames: of these, if they are a video.
        tiled: the image's shape, if these are all its patches and it is seen in tiles.
        method: with the part's budget.
    """

    image: int
    where: slice
    grid: Grid | None
    frames: int | None
    method: Method
    tiled: TokenLayout | None = None

    @property
    def size(self) -> int:
        return int(self.where.stop - self.where.start)

    @property
    def kind(self) -> Hashable:
        """Parts of one kind are decided about at once."""
        mosaic = None if self.tiled is None else (self.tiled.views, self.tiled.tiles)
        return self.size, self.grid, self.frames, mosaic, budget_of(self.method)


def check_scope(scope: str, methods: Sequence[Method]) -> None:
    """Refuse a scope that does not exist, or that a budget cannot have."""
    if scope not in get_args(Scope):
        allowed = ", ".join(map(repr, get_args(Scope)))
        raise Refusal(f"budget_scope must be one of {allowed}; got {scope!r}")
    stages = ("connector",) if scope in ("tile", "frame", "sample-score") else ("connector", "decoder")
    for method in methods if scope not in ("image", "clip") else ():
        if method.info.stage not in stages:
            raise Refusal(f"budget_scope={scope!r} is not for methods that act in the {method.info.stage}: {method}")
        if scope == "frame" and method.needs.video:
            raise Refusal(f"budget_scope='frame' shows a method one frame at a time; {method} compares frames")
        if scope == "sample" and method.needs.video:
            raise Refusal(f"budget_scope='sample' would share with images, which {method} leaves whole")
        if scope == "sample" and any(getattr(method, name, None) is not None for name in ("average", "counts")):
            raise Refusal(f"budget_scope='sample' shares out keep; {method} has other budgets")
        if scope == "sample-score" and budget_of(method) is not None and not method.by_score:
            raise Refusal(
                f"budget_scope='sample-score' ranks the tokens of all images by one score; {method} does not choose by "
                "a score alone that compares across images: use budget_scope='sample'"
            )


def budget_of(method: Method) -> Budget | None:
    """What of a method may differ from image to image."""
    keep: Budget | None = getattr(method, "keep", None)
    return keep


def per_sample(method: AnyMethod, scope: Scope, samples: Sequence[Sequence[int]]) -> list[list[AnyMethod]]:
    """The method of each image `[sample][image]`, whose patches are counted in ``samples``."""
    keep = budget_of(method)
    if scope != "sample" or keep is None:
        return [[method] * len(sizes) for sizes in samples]
    return [[_with(method, share) for share in share_out(keep, sizes)] for sizes in samples]


def decide(
    method: Method,
    scope: Scope,
    shapes: Sequence[TokenLayout],
    samples: Sequence[Sequence[int]],
    see: Callable[[list[DecisionUnit]], VisualTokens],
) -> list[list[Reduction]]:
    """What the method decides about the parts of each image, all images in order.

    Args:
        samples: `[sample][image]`, how many patches each image has.
        see: what the method sees of equal parts.
    """
    methods, keep = per_sample(method, scope, samples), budget_of(method)
    if scope == "sample-score" and keep is not None:
        ranked = _each([_with(method, 1)] * len(shapes), scope, shapes, see)  # for its scores only
        scores = (torch.cat(list(map(scores_of, of_image))) for of_image in ranked)
        shares = [share_by_score(keep, [next(scores) for _ in sizes]) for sizes in samples]
        methods = [[_with(method, share) for share in row] for row in shares]
    return _each([own for row in methods for own in row], scope, shapes, see)


def _each(
    methods: Sequence[Method],
    scope: Scope,
    shapes: Sequence[TokenLayout],
    see: Callable[[list[DecisionUnit]], VisualTokens],
) -> list[list[Reduction]]:
    """Decisions about the parts of each image, each image with its own method."""
    both = enumerate(zip(shapes, methods, strict=True))
    parts = [part for image, (shape, own) in both for part in parts_of(image, shape, own, scope)]
    made: dict[int, Reduction] = {}
    for group in equal_groups([part.kind for part in parts]):
        members = [parts[number] for number in group]
        made |= dict(zip(group, members[0].method(see(members)), strict=True))
    of_image: list[list[Reduction]] = [[] for _ in shapes]
    for number, part in enumerate(parts):
        of_image[part.image].append(made[number])
    return of_image


def scores_of(decision: Reduction) -> Tensor:
    """What an image's tokens were ranked by, `[N]`; those of an image that was kept whole do not matter."""
    if decision.scores is None and not decision.whole:
        raise Refusal("a method that declares by_score must give its scores to image.keep()")
    return torch.zeros(decision.total, device=decision.anchors.device) if decision.scores is None else decision.scores


def share_by_score(keep: Budget, scores: Sequence[Tensor]) -> list[int]:
    """A budget for images together, shared out by how many of the best of all ``scores`` `[N]` each holds.

    Exact in sum, and at least 1 each: fewer tokens than images leave one each. Of equals the earlier is the better.
    """
    first = [row.float().scatter(0, row.argmax(0, keepdim=True), torch.inf) for row in scores]
    every, sizes = torch.cat(first), list(map(len, scores))
    best = top_k(every, max(count(keep, len(every)), len(scores)))
    held = torch.split(torch.zeros_like(every).index_fill(0, best, 1), sizes)
    return [int(n) for n in torch.stack([part.sum() for part in held]).tolist()]


def parts_of(image: int, shape: TokenLayout, method: Method, scope: Scope) -> list[DecisionUnit]:
    """The parts of one image: its views where the scope asks for them, or the method for a grid; else all of it."""
    keep = budget_of(method)
    sizes = list(map(prod, shape.views))
    each = scope == ("frame" if shape.video else "tile")
    by_view = len(sizes) > 1 and (each or method.needs.grid)
    if not by_view or (not each and keep is not None and count(keep, shape.patches) == shape.patches):
        tiled = None if shape.tile is None else shape
        return [DecisionUnit(image, slice(0, shape.patches), shape.stacked, shape.frames, method, tiled)]
    methods = [method] * len(sizes)
    if not each and keep is not None:
        methods = [_with(method, share) for share in share_out(keep, sizes)]
    starts = [sum(sizes[:view]) for view in range(len(sizes))]
    return [
        DecisionUnit(image, slice(start, start + size), grid, None, own)
        for start, size, grid, own in zip(starts, sizes, shape.views, methods, strict=True)
    ]


def _with(method: AnyMethod, keep: int) -> AnyMethod:
    """The method with another budget."""
    own: dict[str, Any] = {"keep": keep}
    return replace(method, **own)
