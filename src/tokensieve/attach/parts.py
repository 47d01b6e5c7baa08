"""What a method decides about at once: an image, or each of its views, each with its share of the budget."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from tokensieve.budget import Budget, count, share_out
from tokensieve.methods import Method
from tokensieve.models import Shape
from tokensieve.models.shape import Grid

Scope: TypeAlias = Literal["image", "sample", "tile", "clip", "frame"]
AnyMethod = TypeVar("AnyMethod", bound=Method)


@dataclass(frozen=True)
class Part:
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
    tiled: Shape | None = None

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
        raise ValueError(f"budget_scope must be one of {allowed}; got {scope!r}")
    stages = ("connector",) if scope in ("tile", "frame") else ("connector", "decoder")
    for method in methods if scope not in ("image", "clip") else ():
        if method.info.stage not in stages:
            raise ValueError(f"budget_scope={scope!r} is not for methods that act in the {method.info.stage}: {method}")
        if scope == "frame" and method.needs.video:
            raise ValueError(f"budget_scope='frame' shows a method one frame at a time; {method} compares frames")
        if scope == "sample" and method.needs.video:
            raise ValueError(f"budget_scope='sample' would share with images, which {method} leaves whole")
        if scope == "sample" and any(getattr(method, name, None) is not None for name in ("average", "counts")):
            raise ValueError(f"budget_scope='sample' shares out keep; {method} has other budgets")


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


def parts_of(image: int, shape: Shape, method: Method, scope: Scope) -> list[Part]:
    """The parts of one image: its views where the scope asks for them, or the method for a grid; else all of it."""
    keep = budget_of(method)
    sizes = list(map(prod, shape.views))
    each = scope == ("frame" if shape.video else "tile")
    by_view = len(sizes) > 1 and (each or method.needs.grid)
    if not by_view or (not each and keep is not None and count(keep, shape.patches) == shape.patches):
        tiled = None if shape.tile is None else shape
        return [Part(image, slice(0, shape.patches), shape.stacked, shape.frames, method, tiled)]
    methods = [method] * len(sizes)
    if not each and keep is not None:
        methods = [_with(method, share) for share in share_out(keep, sizes)]
    starts = [sum(sizes[:view]) for view in range(len(sizes))]
    return [
        Part(image, slice(start, start + size), grid, None, own)
        for start, size, grid, own in zip(starts, sizes, shape.views, methods, strict=True)
    ]


def _with(method: AnyMethod, keep: int) -> AnyMethod:
    """The method with another budget."""
    own: dict[str, Any] = {"keep": keep}
    return replace(method, **own)
