"""``tokensieve train METHOD``: train the net of a method beside a frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tokensieve.commands.arguments import Json, with_load_options
from tokensieve.commands.console import note, print_json
from tokensieve.commands.loading import note_foreign_images
from tokensieve.loading import LoadOptions


class Recipes(TyperGroup):
    """The recipes of ``tokensieve train`` by name; another name is that of a method with a net."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args[0].startswith("-") or args[0] in self.commands
        return super().resolve_command(ctx, args if known else ["method", *args])


@with_load_options()
def method(
    loading: LoadOptions,
    method: Annotated[str, typer.Argument(help="A method with a net, such as visionselector, or FILE.py:CLASS.")],
    model: Annotated[str, typer.Option(help="The model, which stays as it is.")] = "reference",
    data: Annotated[
        str, typer.Option(help="Questions with answers: a file, NAME:SPLIT of datasets, reference:train[:700].")
    ] = "reference:train[:3900]",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the net, for weights=.", show_default="runs/METHOD")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Budget in training; of '22%, 11%', each step draws one."),
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="Questions to measure on.", show_default="a twentieth of the images")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data.", show_default="1; 60 over the states of gates")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Records per step.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Steps per update.")] = 1,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="1e-4; gates 1e-3")] = None,
    distillation: Annotated[
        float | None, typer.Option(help="Weight of the unreduced model as a teacher.", show_default="1; a twig 0")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Text of the user turn.")] = "{question}",
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    resume: Annotated[bool, typer.Option(help="Continue from what the folder holds.")] = True,
    json: Json = False,
) -> None:
    """Train the net of METHOD beside a frozen model; `tokensieve train METHOD` is short for this."""
    from tokensieve.commands.arguments import split_budgets
    from tokensieve.methods import parse
    from tokensieve.train.adapter.data import REFERENCE
    from tokensieve.train.method import Recipe, train_method
    from tokensieve.train.method.run import trained_one

    keeps = None if keep is None else split_budgets(keep)
    stages = parse(method) if keeps is None else parse(method, keep=keeps[0])
    folder = output or Path("runs") / trained_one(stages).info.name
    settings = {
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "rate": rate,
        "distillation": distillation,
        "prompt": prompt,
        "seed": seed,
        "keeps": keeps if keeps and len(keeps) > 1 else None,
    }
    if not data.startswith(REFERENCE):
        note_foreign_images(model)
    recipe = Recipe.of(trained_one(stages).learns, **settings)
    about = train_method(
        stages, model, data, folder, recipe=recipe, evaluation=evaluation, loading=loading, resume=resume
    )
    if json:
        print_json(about)
    for name, measured in about["metrics"].items():
        if isinstance(measured, dict):
            note(f"{name}: {measured['accuracy']:.1%} right with {measured['tokens']:.1f} tokens on average")
    if about["metrics"]["skipped"]:
        note(f"{about['metrics']['skipped']} records could not be used")
    note(f"weights: {folder}")
