"""``tokensieve calibrate``: find a method's parameters on data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from tokensieve.budget import parse_number
from tokensieve.commands.arguments import (
    DataOptions,
    Json,
    Model,
    Prompt,
    with_data_options,
    with_load_options,
)
from tokensieve.commands.console import note, print_json, print_table, progress
from tokensieve.commands.loading import note_foreign_images
from tokensieve.loading import LoadOptions, load_model

app = typer.Typer(no_args_is_help=True, help="Find a method's parameters on data.")


@app.callback()
def calibrate() -> None:
    """Find a method's parameters on data."""


@app.command()
@with_load_options()
@with_data_options(answers=False)
def vtw(
    *,
    loading: LoadOptions,
    model: Model = "reference",
    data: DataOptions,
    limit: Annotated[int, typer.Option(min=1, help="Largest number of questions, spread over the data.")] = 20,
    threshold: Annotated[float, typer.Option(min=0, help="Largest accepted mean KL divergence.")] = 0.003,
    first_layer: Annotated[int | None, typer.Option(min=1, help="First candidate.", show_default="5 of 32")] = None,
    output: Annotated[Path, typer.Option(help="File of the result.")] = Path("vtw.json"),
    prompt: Prompt = "{question}",
    json: Json = False,
) -> None:
    """Find the first layer from which VTW may withdraw the visual tokens; 'vtw(calibration="vtw.json")' uses it."""
    from tokensieve.evaluate.calibrate import calibrate_vtw

    samples = data.load(limit=limit)
    vlm, processor = load_model(model, loading)
    if not data.bundled:
        note_foreign_images(model)
    with progress() as bar:
        result = calibrate_vtw(
            vlm, processor, samples, threshold=threshold, first=first_layer, prompt=prompt, progress=bar
        )
    if json:
        print_json(asdict(result))
    else:
        rows = zip(result.layers, result.divergence, strict=True)
        print_table(("layer", "KL", ""), [[str(n), f"{kl:.2g}", "←" * (n == result.layer)] for n, kl in rows])
    result.save(output)
    note(f"result: {output}")


@app.command()
@with_load_options()
@with_data_options(answers=False)
def average(
    *,
    loading: LoadOptions,
    method: Annotated[str, typer.Option(help="Method spec that leaves its budget open.")] = "scope",
    keep: Annotated[str, typer.Option(help="Wanted average: tokens per image (64) or a share (11%).")] = "25%",
    by: Annotated[
        Literal["gain", "mass", "rank"],
        typer.Option(help="What an image's tokens are worth: further coverage, score mass or effective rank."),
    ] = "gain",
    model: Model = "reference",
    data: DataOptions,
    limit: Annotated[int, typer.Option(min=1, help="Largest number of images, spread over the data.")] = 50,
    output: Annotated[Path, typer.Option(help="The spec file of the result.")] = Path("average.json"),
    prompt: Prompt = "{question}",
    json: Json = False,
) -> None:
    """Find the threshold at which images keep different numbers of tokens, with a wanted average over the data."""
    from tokensieve.engine.budget_scope import check_scope
    from tokensieve.evaluate.average import calibrate_average, one_per_image
    from tokensieve.methods import parse

    stages = parse(method, keep=f"average:{parse_number(keep)!r}:{by}")
    check_scope("image", stages)  # a method that cannot have such a budget is refused before a model is loaded
    samples = data.load()
    vlm, processor = load_model(model, loading)
    if not data.bundled:
        note_foreign_images(model)
    texts = {"prompt": prompt, "text_processor": processor}
    with progress() as bar:
        result = calibrate_average(vlm, processor, one_per_image(samples, limit), stages, **texts, progress=bar)
    if json:
        print_json(asdict(result))
    else:
        tokens = f"{result.mean:.4g} on average, {result.fewest} to {result.most}"
        print_table(("budget", "images", "tokens"), [[result.keep, str(result.images), tokens]])
    result.save(output)
    note(f"spec file: {output}")
