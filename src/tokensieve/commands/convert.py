"""``tokensieve convert``: checkpoints that authors published under other parameter names than transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokensieve.commands.console import note

app = typer.Typer(no_args_is_help=True, help="Turn an author's checkpoint into a transformers model.")


@app.callback()
def convert() -> None:
    """Turn an author's checkpoint into a transformers model."""


@app.command()
def pumer(
    source: Annotated[Path, typer.Argument(help="Weight file (.bin, .pt, .ckpt, .safetensors), or a folder with one.")],
    target: Annotated[Path, typer.Argument(help="New folder for the model.")],
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Attention heads.", show_default="config.json's, or one per 64 columns"),
    ] = None,
) -> None:
    """Turn a ViLT or METER checkpoint of PuMer's authors into a model that from_pretrained reads."""
    from tokensieve.fusion.convert import convert as run

    model = run(source, target, heads=heads)
    note(f"{type(model).__name__}, {model.num_parameters():,} weights: {target}")
