"""Options that several commands share, and how lists in them are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from tokensieve.budget import Budget, parse_budget
from tokensieve.budget import BudgetScope as Scope
from tokensieve.errors import Refusal

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, everything else on stderr.")]
Model: TypeAlias = Annotated[
    str, typer.Option(help="Folder or hub name of a vision-language model; 'reference' is the bundled one.")
]
Methods: TypeAlias = Annotated[str, typer.Option(help="Method specs with commas between: 'vtc-cls, random(seed=1)'.")]
Keeps: TypeAlias = Annotated[
    str, typer.Option("--keep", help="Budgets with commas between: tokens per image (64) or shares (0.25, 11%).")
]
BudgetScope: TypeAlias = Annotated[
    Scope, typer.Option(help="What a budget is for: each image, all of a sample (by size or by score), each tile…")
]
ImageFile: TypeAlias = Annotated[Path, typer.Argument(help="Image file.", show_default=False)]

METHODS = "vtc-cls, trsm, fastervlm, divprune, pool, random"
KEEPS = "25%, 11%"


def convention(text: str) -> Literal["kept", "average"]:
    """The budget convention that a text names; ``ValueError`` if it names none."""
    if text == "kept":
        return "kept"
    if text == "average":
        return "average"
    raise Refusal(f"--budget must be 'kept' or 'average'; got {text!r}")


def split_specs(text: str) -> list[str]:
    """Method specs between the commas of a text; commas inside parentheses do not count.

    Raises:
        ValueError: if there is none.
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return _named([part.strip() for part in parts], "method", text)


def split_budgets(text: str) -> list[Budget]:
    """Budgets between the commas of a text; ``ValueError`` naming the one that is none."""
    return [parse_budget(part) for part in _named([part.strip() for part in text.split(",")], "budget", text)]


def _named(parts: list[str], what: str, text: str) -> list[str]:
    if not all(parts):
        raise Refusal(f"a {what} is missing in {text!r}")
    return parts
