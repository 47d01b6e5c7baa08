"""The scope of a budget: each image, each tile or frame, or all images of a sample together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from tokensieve.budget import BudgetScope, share_out
from tokensieve.errors import Refusal
from tokensieve.methods import Method
from tokensieve.methods.base import AnyMethod


def check_scope(scope: str, methods: Sequence[Method]) -> None:
    """Refuse a scope that does not exist, or that the budget of a method cannot have."""
    if scope not in get_args(BudgetScope):
        allowed = ", ".join(map(repr, get_args(BudgetScope)))
        raise Refusal(f"budget_scope must be one of {allowed}; got {scope!r}")
    if scope in ("image", "clip"):
        return
    stages = ("connector",) if scope in ("tile", "frame", "sample-score") else ("connector", "decoder")
    for method in methods:
        if method.info.stage not in stages:
            raise Refusal(f"budget_scope={scope!r} is not for methods that act in the {method.info.stage}: {method}")
        if scope == "frame" and method.needs.requests("video"):
            raise Refusal(f"budget_scope='frame' gives a method one frame at a time; {method} compares frames")
        if scope == "sample" and method.needs.requests("video"):
            raise Refusal(f"budget_scope='sample' would share with images, which {method} leaves whole")
        if scope == "sample" and any(getattr(method, name, None) is not None for name in ("average", "counts")):
            raise Refusal(f"budget_scope='sample' shares out keep; {method} has other budgets")
        if scope == "sample-score" and method.budget is not None and not method.by_score:
            raise Refusal(
                f"budget_scope='sample-score' ranks the tokens of all images by one score; {method} does not choose by "
                "a score alone that compares across images: use budget_scope='sample'"
            )


def methods_per_image(method: AnyMethod, scope: BudgetScope, samples: Sequence[Sequence[int]]) -> list[list[AnyMethod]]:
    """Return the method with the budget of each image, `[sample][image]`.

    Args:
        samples: `[sample][image]`, the number of patches of each image.
    """
    if scope != "sample" or method.budget is None:
        return [[method] * len(sizes) for sizes in samples]
    return [[method.with_budget(share) for share in share_out(method.budget, sizes)] for sizes in samples]
