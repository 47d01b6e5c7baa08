"""``tokensieve harness``: questions for evaluation harnesses, and the harnesses that need a launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tokensieve.commands.arguments import (
    BudgetScope,
    Data,
    FetchImages,
    Model,
    Prompt,
    Repair,
    Separators,
    Split,
    with_load_options,
)
from tokensieve.commands.console import note
from tokensieve.loading import LoadOptions

app = typer.Typer(no_args_is_help=True, help="Run methods inside lmms-eval, lm-eval and VLMEvalKit.")
# the harness reads these arguments, --help among them
PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of questions, images and tasks.", show_default=False)],
    data: Data = "reference",
    split: Split = None,
    fetch_images: FetchImages = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Largest number of questions, as in compare.", show_default="all")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the task, and of VLMEvalKit's data set.")] = "tokensieve_bench",
    metric: Annotated[str, typer.Option(help="Score of an answer, as in compare.")] = "exact",
    prompt: Prompt = "{question}",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
) -> None:
    """Write questions as tasks of lmms-eval and lm-eval, and as a data set of VLMEvalKit, for use without a network."""
    from tokensieve.evaluate import load_data
    from tokensieve.harness.export import QUESTIONS
    from tokensieve.harness.export import export as write

    loaded = load_data(data, split=split, fetch_images=fetch_images, limit=limit)
    samples = [sample for sample in loaded if not sample.turns]
    if later := len(loaded) - len(samples):
        note(f"note: the harnesses ask single questions: {later} of {len(loaded)}, in a later turn, are left out")
    write(folder, samples, name=name, metric=metric, prompt=prompt, max_new_tokens=max_new_tokens)
    note(f"{len(samples)} questions: {folder / QUESTIONS}")
    note(f"lmms-eval:  --tasks {name} --include_path {folder / 'lmms_eval'}")
    note(f"lm-eval:    --tasks {name} --include_path {folder / 'lm_eval'} --apply_chat_template")
    note(f"VLMEvalKit: LMUData={folder / 'vlmevalkit'} … --data {name} --mode infer")


@app.command("lm-eval", context_settings={**PASSED_ON, "help_option_names": []})
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval, with --model tokensieve-multimodal known to it. All arguments are lm-eval's own."""
    from tokensieve.harness.launch import run_lm_eval

    run_lm_eval(context.args)


@app.command(context_settings=PASSED_ON)
@with_load_options()
def vlmevalkit(
    context: typer.Context,
    loading: LoadOptions,
    model: Model = "reference",
    method: Annotated[str, typer.Option(help="Method spec; 'full' drops nothing.")] = "vtc-cls",
    keep: Annotated[
        str | None, typer.Option(help="Budget: tokens (64) or a share (25%).", show_default="the method's own")
    ] = None,
    positions: Annotated[
        Literal["original", "contiguous"], typer.Option(help="Whether kept tokens keep their position ids.")
    ] = "original",
    budget_scope: BudgetScope = "image",
    separators: Separators = "kept-lines",
    repair: Repair = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    name: Annotated[str, typer.Option(help="Name of the model in VLMEvalKit's files.")] = "tokensieve",
    work_dir: Annotated[Path, typer.Option(help="Folder of VLMEvalKit's results.")] = Path("outputs"),
) -> None:
    """Run VLMEvalKit on a model with a method attached. Further arguments are those of its run.py: --data, --mode…."""
    from tokensieve.harness.launch import run_vlmevalkit

    run_vlmevalkit(
        model,
        context.args,
        name=name,
        work_dir=work_dir,
        loading=loading,
        max_new_tokens=max_new_tokens,
        options={
            "method": method,
            "keep": keep,
            "positions": positions,
            "budget_scope": budget_scope,
            "separators": separators,
            "repair": repair,
        },
    )
