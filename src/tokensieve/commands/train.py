"""``tokensieve train``: the committed recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokensieve.commands.console import note

app = typer.Typer(no_args_is_help=True, help="Train the bundled model from nothing, by its committed recipe.")


@app.callback()
def train() -> None:
    """Train the bundled model from nothing, by its committed recipe."""


@app.command()
def reference(
    output: Annotated[Path, typer.Option(help="Folder of checkpoint, metrics and model.")] = Path("runs/reference"),
    effort: Annotated[float, typer.Option(min=0.0, help="Share of the recipe's steps.")] = 1.0,
    scenes: Annotated[int, typer.Option(min=1, help="Training images, about 90 KB of memory each.")] = 32_000,
    seed: Annotated[int, typer.Option(help="Of data, weights and order.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Processes of one thread; the result depends on it.")] = 2,
    resume: Annotated[bool, typer.Option(help="Continue from the folder's checkpoint.")] = True,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile: a slow start, then fast steps.")] = False,
) -> None:
    """Train the reference model from nothing by its committed recipe; continues what lies in the output folder."""
    from tokensieve.train.reference import train_reference

    folder = train_reference(
        output, scenes=scenes, effort=effort, seed=seed, resume=resume, processes=processes, compiled=compiled
    )
    note(f"model: {folder}")
