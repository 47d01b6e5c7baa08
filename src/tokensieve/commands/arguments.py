"""Options that several commands share, and the parsing of lists in them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from tokensieve.budget import Budget, parse_budget
from tokensieve.budget import BudgetScope as Scope
from tokensieve.errors import Refusal

if TYPE_CHECKING:
    from tokensieve.evaluate.plan import Entry

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, all else on stderr.")]
Model: TypeAlias = Annotated[
    str, typer.Option(help="Folder or hub name of a vision-language model; 'reference' is the bundled one.")
]
Data: TypeAlias = Annotated[
    str,
    typer.Option(help="'reference'; a .jsonl, .json, .csv, .tsv or .parquet file; a folder of datasets; a hub name."),
]
Split: TypeAlias = Annotated[
    str | None, typer.Option(help="Split of --data, if it has several.", show_default="the only one")
]
FetchImages: TypeAlias = Annotated[
    bool, typer.Option("--fetch-images", help="Fetch images given as URLs, from any host that the data name.")
]
ImageColumn: TypeAlias = Annotated[str, typer.Option(help="Column of images: files relative to the data, or lists.")]
QuestionColumn: TypeAlias = Annotated[str, typer.Option(help="Column of questions.")]
Prompt: TypeAlias = Annotated[str, typer.Option(help="Text of the user turn; {question} is replaced.")]
Methods: TypeAlias = Annotated[str, typer.Option(help="Method specs with commas between: 'vtc-cls, random(seed=1)'.")]
Keeps: TypeAlias = Annotated[
    str, typer.Option("--keep", help="Budgets with commas between: tokens per image (64) or shares (0.25, 11%).")
]
BudgetScope: TypeAlias = Annotated[
    Scope, typer.Option(help="Unit of a budget: each image, all of a sample (by size or by score), each tile…")
]
ImageFile: TypeAlias = Annotated[Path, typer.Argument(help="Image file.", show_default=False)]

METHODS = "vtc-cls, trsm, fastervlm, divprune, pool, random"
KEEPS = "25%, 11%"


def check_scopes(scope: Scope, entries: Iterable[Entry]) -> None:
    """Refuse a budget scope that a method of a plan does not support, before a model is loaded."""
    from tokensieve.engine.budget_scope import check_scope

    for entry in entries:
        for run in entry.runs:
            check_scope(scope, run.stages)


def split_specs(text: str) -> list[str]:
    """Return the method specs between the commas of a text; commas inside parentheses do not separate.

    Raises:
        Refusal: an empty spec.
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return _nonempty([part.strip() for part in parts], "method", text)


def split_budgets(text: str) -> list[Budget]:
    """Return the budgets between the commas of a text; raise :class:`Refusal` naming a part that is no budget."""
    return [parse_budget(part) for part in _nonempty([part.strip() for part in text.split(",")], "budget", text)]


def _nonempty(parts: list[str], kind: str, text: str) -> list[str]:
    if not all(parts):
        raise Refusal(f"a {kind} is missing in {text!r}")
    return parts
