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


@app.command()
def llava(
    source: Annotated[
        Path, typer.Argument(help="Folder of a checkpoint: a whole model, a LoRA, or a projector alone.")
    ],
    target: Annotated[Path, typer.Argument(help="New folder for the model.")],
    tower: Annotated[
        str | None,
        typer.Option(help="CLIP vision encoder: folder or hub name.", show_default="config.json's mm_vision_tower"),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the model that a LoRA or a projector was trained on.")
    ] = None,
) -> None:
    """Turn a LLaVA-1.5 checkpoint in the authors' original format into a model that from_pretrained reads."""
    from tokensieve.convert import convert_llava

    converted = convert_llava(source, target, tower=tower, base=base)
    for title, names in converted.left.items():
        note(f"note: {len(names)} tensors of {title} stay in {source} ({names[0]}, …); the method reads them there")
    if converted.without_projector:
        note("note: the checkpoint has no projector of LLaVA's, so that without that method the model sees nothing")
    note(f"LlavaForConditionalGeneration, {converted.weights:,} weights: {converted.folder}")
