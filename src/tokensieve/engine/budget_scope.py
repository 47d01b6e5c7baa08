"""The budget of each image: the scope of a number, and the rules that are worked out in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from tokensieve.budget import BudgetScope, number, rule_of, share_out
from tokensieve.errors import Refusal
from tokensieve.methods import Method
from tokensieve.methods.base import AnyMethod
from tokensieve.methods.registers import RegisterMethod


def check_scope(scope: str, methods: Sequence[Method]) -> None:
    """Refuse a scope that does not exist, or that the budget of a method cannot have."""
    if scope not in get_args(BudgetScope):
        allowed = ", ".join(map(repr, get_args(BudgetScope)))
        raise Refusal(f"budget_scope must be one of {allowed}; got {scope!r}")
    _check_rules(scope, methods)
    if scope in ("image", "clip"):
        return
    stages = ("connector",) if scope in ("tile", "frame", "sample-score") else ("connector", "decoder")
    for method in methods:
        if isinstance(method, RegisterMethod):
            raise Refusal(f"budget_scope={scope!r} shares out tokens, and {method} adds registers to each image")
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


def _check_rules(scope: str, methods: Sequence[Method]) -> None:
    """Refuse rules of stages and scopes that cannot have them, and two rules for the layers that differ."""
    layer_rules = set()
    for method in methods:
        rule = rule_of(method.budget)
        if rule is None:
            continue
        if scope not in ("image", "clip"):
            raise Refusal(f"keep={method.budget!r} is a budget of each image; got budget_scope={scope!r}")
        stages = ("connector",) if rule.mean == "average" else ("connector", "decoder")
        if method.info.stage not in stages:
            raise Refusal(
                f"keep={method.budget!r} is for methods that act in the {' or '.join(stages)}; {method.info.name} acts "
                f"in the {method.info.stage}: give it a number, as in {method.info.name}(keep=0.5)"
            )
        layer_rules |= {rule} if rule.mean == "layers" else set()
    if len(layer_rules) > 1:
        raise Refusal(
            f"one average over the layers holds for all stages; got {' and '.join(sorted(map(str, layer_rules)))}"
        )


def check_calibrated(methods: Sequence[Method]) -> None:
    """Refuse an average over the data without a threshold."""
    for method in methods:
        rule = rule_of(method.budget)
        if rule is not None and rule.mean == "average" and rule.threshold is None:
            raise Refusal(
                f"keep={method.budget!r} has no threshold yet: `tokensieve calibrate average` finds one on images of "
                "yours, and `compare` on those that it compares"
            )


def methods_per_image(method: AnyMethod, scope: BudgetScope, samples: Sequence[Sequence[int]]) -> list[list[AnyMethod]]:
    """Return the method with the budget of each image, `[sample][image]`.

    Args:
        samples: `[sample][image]`, the number of patches of each image.
    """
    if scope != "sample" or method.budget is None:
        return [[method] * len(sizes) for sizes in samples]
    keep = number(method.budget)
    return [[method.with_budget(share) for share in share_out(keep, sizes)] for sizes in samples]
