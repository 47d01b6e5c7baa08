"""``tokensieve train``: the committed training recipes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import typer

from tokensieve.commands.arguments import (
    Json,
    Keeps,
    Methods,
    Model,
    Prompt,
    split_budgets,
    split_specs,
    with_load_options,
)
from tokensieve.commands.console import note, print_json, print_table
from tokensieve.commands.train_net import Recipes, method
from tokensieve.errors import Refusal
from tokensieve.loading import LoadOptions, find

TRAINED_FROM = tuple(field.name for field in fields(LoadOptions) if field.name != "adapter")
app = typer.Typer(
    cls=Recipes,
    no_args_is_help=True,
    help="Train the net of a method, adapters under a method, PuMer, or the bundled model.",
)
app.command("method")(method)


@app.callback()
def train() -> None:
    """Train the bundled model from nothing, an adapter for a method on your data, or PuMer."""


@app.command()
def reference(
    output: Annotated[Path, typer.Option(help="Folder of checkpoint, metrics and model.")] = Path("runs/reference"),
    effort: Annotated[float, typer.Option(min=0.0, help="Share of the recipe's steps.")] = 1.0,
    scenes: Annotated[int, typer.Option(min=1, help="Training images, about 90 KB of memory each.")] = 32_000,
    seed: Annotated[int, typer.Option(help="Of data, weights and order.")] = 0,
    start: Annotated[Path | None, typer.Option(help="Earlier model of this recipe to start from.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of one thread; the result depends on it.")] = 2,
    resume: Annotated[bool, typer.Option(help="Continue from the folder's checkpoint.")] = True,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile: a slow start, then fast steps.")] = False,
) -> None:
    """Train the reference model from nothing by its committed recipe; continue from a checkpoint in the folder."""
    from tokensieve.train.reference import train_reference

    folder = train_reference(
        output,
        scenes=scenes,
        effort=effort,
        seed=seed,
        start=start,
        resume=resume,
        processes=processes,
        compiled=compiled,
    )
    note(f"model: {folder}")


@app.command("vilt-reference")
def vilt_reference(
    output: Annotated[Path, typer.Option(help="Folder of checkpoint, metrics and model.")] = Path(
        "runs/vilt-reference"
    ),
    effort: Annotated[float, typer.Option(min=0.0, help="Share of the recipe's steps.")] = 1.0,
    scenes: Annotated[int, typer.Option(min=1, help="Training images, about 90 KB of memory each.")] = 12_000,
    seed: Annotated[int, typer.Option(help="Of data, weights and order.")] = 0,
    resume: Annotated[bool, typer.Option(help="Continue from the folder's checkpoint.")] = True,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile: a slow start, then fast steps.")] = False,
) -> None:
    """Pretrain the small ViLT of the bundled questions, from which `train pumer` starts."""
    from tokensieve.train.vilt_reference import train_vilt_reference

    folder = train_vilt_reference(output, scenes=scenes, effort=effort, seed=seed, resume=resume, compiled=compiled)
    note(f"model: {folder}")


@app.command()
@with_load_options("revision", "processor")
def pumer(
    loading: LoadOptions,
    task: Annotated[str, typer.Option(help="vqa, nlvr2, ve or retrieval.")],
    model: Annotated[str, typer.Option(help="Pretrained ViLT, METER or BridgeTower to start from.")],
    data: Annotated[
        str,
        typer.Option(help="Training records: a .jsonl file, NAME:SPLIT of the datasets library, reference:train."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of checkpoints and model.")] = Path("runs/pumer"),
    teacher: Annotated[str | None, typer.Option(help="Fine-tuned, unreduced model to distil from.")] = None,
    evaluation: Annotated[str | None, typer.Option(help="Records to measure accuracy on after each epoch.")] = None,
    method: Annotated[str, typer.Option(help="The method, or 'full' for the unreduced fine-tune.")] = "pumer",
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.", show_default="20")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records per step and device.", show_default="32")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Steps per update.", show_default="1")] = None,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="the paper's")] = None,
    head_rate: Annotated[
        float | None, typer.Option(help="Times that, for the head.", show_default="the paper's")
    ] = None,
    cross_rate: Annotated[
        float | None, typer.Option(help="Times that, for cross-modal layers.", show_default="the paper's")
    ] = None,
    distillation: Annotated[float | None, typer.Option(help="Weight of the teacher.", show_default="1")] = None,
    patience: Annotated[int | None, typer.Option(help="Epochs without a better one.", show_default="3")] = None,
    precision: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "fp32",
    workers: Annotated[int, typer.Option(min=0, help="Processes that open images.")] = 0,
    seed: Annotated[int, typer.Option(help="Of head, order and dropout.")] = 0,
    resume: Annotated[bool, typer.Option(help="Continue from the folder's last checkpoint.")] = True,
    json: Json = False,
) -> None:
    """Fine-tune a cross-modal encoder with PuMer attached, distilling from the unreduced model."""
    from tokensieve.train.pumer import Recipe, train_pumer
    from tokensieve.train.pumer.models import load_config

    options = {
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "rate": rate,
        "head_rate": head_rate,
        "cross_rate": cross_rate,
        "distillation": distillation,
        "patience": patience,
    }
    place, teacher = find(model, loading.revision), teacher and find(teacher).path
    config = load_config(place.path, place.revision)
    recipe = Recipe.for_model(config.model_type, **options, precision=precision, workers=workers, seed=seed)
    spec = None if method == "full" else method
    training = {
        "revision": place.revision,
        "processor": loading.processor,
        "teacher": teacher,
        "evaluation": evaluation,
        "spec": spec,
        "recipe": recipe,
        "resume": resume,
    }
    outcome = train_pumer(task, place.path, data, output, **training)  # type: ignore[arg-type]
    if json:
        print_json(outcome)
    elif "eval_accuracy" in outcome:
        note(f"accuracy: {outcome['eval_accuracy']:.1%}")
    if outcome["skipped"]:
        note(f"{outcome['skipped']:.0f} records could not be used")
    note(f"model: {output / 'model'}")


@app.command()
@with_load_options(*TRAINED_FROM)
def adapter(
    loading: LoadOptions,
    data: Annotated[
        str,
        typer.Option(help="Questions with answers: a file as for `compare`, NAME:SPLIT of datasets, reference:train."),
    ],
    model: Model = "reference",
    methods: Methods = "pool",
    keep: Keeps = "100%, 25%, 11%, 5%",
    schedule: Annotated[
        str | None, typer.Option(help="Methods by share of the steps: '0: pool-decoder(stride=8); 75%: full'.")
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Run all methods and budgets in each step, as M3 does; else draw one.")
    ] = False,
    parts: Annotated[
        Literal["projector", "lora", "all"],
        typer.Option(help="An adapter on the projector, or on projector and LLM; or all their weights."),
    ] = "lora",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter's matrices.")] = 16,
    distillation: Annotated[
        float, typer.Option(min=0.0, help="Weight of the model without method and adapter as teacher.")
    ] = 0.0,
    output: Annotated[Path, typer.Option(help="Folder of adapter, record and checkpoints.")] = Path("runs/adapter"),
    evaluation: Annotated[
        str | None, typer.Option(help="Questions to measure on.", show_default="a twentieth of the images of --data")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per step and device.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Steps per update.")] = 1,
    rate: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="2e-4; of all weights 2e-5")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the arithmetic: bf16, fp16 or fp32.")] = "fp32",
    prompt: Prompt = "{question}",
    seed: Annotated[int, typer.Option(help="Of adapters, order and draws.")] = 0,
    resume: Annotated[bool, typer.Option(help="Continue from the folder's last checkpoint.")] = True,
    json: Json = False,
) -> None:
    """Fine-tune a model on your data while methods drop its tokens, and measure it at every budget."""
    from tokensieve.train.adapter import Recipe, train_adapter

    phases = {0.0: split_specs(methods)} if schedule is None else _phases(schedule)
    recipe = Recipe(
        phases=phases,
        keeps=split_budgets(keep),
        joint=joint,
        parts=parts,
        rank=rank,
        distillation=distillation,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        rate=rate,
        precision=precision,
        prompt=prompt,
        seed=seed,
    )
    record = train_adapter(model, data, output, recipe=recipe, evaluation=evaluation, loading=loading, resume=resume)
    if json:
        print_json(record)
    else:
        rows = record["metrics"]
        untuned = [name for name in ("untuned_accuracy", "untuned_loss") if name in rows[0]]
        names = ["accuracy", "loss", *untuned]
        table = [[row["method"], *(f"{row[n]:.1%}" if "acc" in n else f"{row[n]:.3f}" for n in names)] for row in rows]
        print_table(["method", *(name.replace("_", " ") for name in names)], table)
        note(f"measured on {record['held_out']} held-out questions")
    if record["skipped"]:
        note(f"{record['skipped']} records could not be used")
    note(f"{'model' if parts == 'all' else 'adapter'}: {output / 'model' if parts == 'all' else output}")


def _phases(text: str) -> dict[float, list[str]]:
    """Return {share of the steps: specs} of a schedule such as ``0: pool-decoder(layer=2); 75%: full``."""
    phases: dict[float, list[str]] = {}
    for part in text.split(";"):
        start, colon, specs = part.partition(":")
        try:
            share = float(start.strip().removesuffix("%")) / (100 if start.strip().endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not colon or not 0 <= share < 1 or share in phases:
            raise Refusal(
                f"a phase is 'SHARE: METHODS' with another share from 0 to below 1, as in '75%: full'; got {part!r}"
            )
        phases[share] = split_specs(specs)
    return phases
