"""``tokensieve train``: the committed training recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tokensieve.commands.arguments import Json, with_load_options
from tokensieve.commands.console import note, print_json
from tokensieve.loading import LoadOptions, find


class _Recipes(TyperGroup):
    """The recipes by name; another name is that of a method with a net."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args[0].startswith("-") or args[0] in self.commands
        return super().resolve_command(ctx, args if known else ["method", *args])


app = typer.Typer(
    cls=_Recipes,
    no_args_is_help=True,
    help="Train the net of a method on your data, PuMer, or the bundled model from nothing.",
)


@app.callback()
def train() -> None:
    """Train the net of a method on your data, PuMer, or the bundled model from nothing.

    `tokensieve train METHOD` trains the net of any method that has one: `tokensieve train visionselector`.
    """


@app.command("method")
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
    keep: Annotated[str | None, typer.Option(help="Budget in training, for a method that has one.")] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="Questions to measure on.", show_default="a twentieth of the images")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Records per step.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Steps per update.")] = 1,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    distillation: Annotated[float, typer.Option(help="Weight of the unreduced model as a teacher.")] = 1.0,
    prompt: Annotated[str, typer.Option(help="Text of the user turn.")] = "{question}",
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    resume: Annotated[bool, typer.Option(help="Continue from what the folder holds.")] = True,
    json: Json = False,
) -> None:
    """Train the net of METHOD beside a frozen model; `tokensieve train METHOD` is short for this."""
    from tokensieve.budget import parse_budget
    from tokensieve.methods import parse
    from tokensieve.train.method import Recipe, train_method

    stages = parse(method) if keep is None else parse(method, keep=parse_budget(keep))
    folder = output or Path("runs") / stages[0].info.name
    recipe = Recipe(epochs, batch_size, accumulate, rate, distillation=distillation, prompt=prompt, seed=seed)
    about = train_method(
        stages, model, data, folder, recipe=recipe, evaluation=evaluation, loading=loading, resume=resume
    )
    if json:
        print_json(about)
    for name, measured in about["metrics"].items():
        if isinstance(measured, dict):
            note(f"{name}: {measured['accuracy']:.1%} right with {measured['tokens']:.1f} tokens on average")
    note(f"weights: {folder}")


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
