"""``tokensieve batch``: answers to many rows, on one machine or a cluster, each row exactly once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tokensieve.commands.arguments import (
    BudgetScope,
    FetchImages,
    ImageColumn,
    Json,
    Model,
    Prompt,
    QuestionColumn,
    Repair,
    Reselect,
    check_scopes,
    split_budgets,
    split_specs,
    with_load_options,
)
from tokensieve.commands.compare import print_rows
from tokensieve.commands.console import note, print_json, progress
from tokensieve.commands.loading import note_foreign_images
from tokensieve.errors import Refusal
from tokensieve.loading import LoadOptions


@with_load_options()
def batch(
    loading: LoadOptions,
    data: Annotated[
        str,
        typer.Option(
            help="'reference'; a .jsonl, .json, .csv, .tsv or .parquet file; a folder of them; a pattern: 'a/*.jsonl'."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the answers; the same command continues from its files.")],
    model: Model = "reference",
    methods: Annotated[
        str, typer.Option(help="Method specs with commas between; 'full' is the model without one.")
    ] = "vtc-cls",
    keep: Annotated[
        str | None,
        typer.Option(
            help="Budgets with commas between: tokens (64) or shares (11%).", show_default="each method's own"
        ),
    ] = None,
    budget_scope: BudgetScope = "image",
    repair: Repair = None,
    reselect: Reselect = False,
    file_format: Annotated[Literal["jsonl", "parquet"], typer.Option("--format", help="Format of the answers.")] = (
        "jsonl"
    ),
    engine: Annotated[
        Literal["auto", "transformers", "vllm"], typer.Option(help="auto: vLLM where it is installed.")
    ] = "auto",
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster, or 'auto'.", show_default="this machine alone")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers.", show_default="one per GPU, else one per four cores")
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="GPUs of each worker.", show_default="1 where there are any")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Most questions per forward. Halved where they do not fit into memory.")
    ] = 16,
    rows_per_part: Annotated[
        int, typer.Option(min=1, help="Rows that are answered and written together; lost work is at most so many.")
    ] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    prompt: Prompt = "{question}",
    image_column: ImageColumn = "image",
    question_column: QuestionColumn = "question",
    answer_column: Annotated[
        str, typer.Option(help="Column of right answers, if there are any: a text, or a list.")
    ] = "answer",
    metric: Annotated[str, typer.Option(help="Score of an answer for the table, as in compare.")] = "exact",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of a method that draws at random.")] = 1,
    fetch_images: FetchImages = False,
    json: Json = False,
) -> None:
    """Answer each row once by each method, through lost workers and nodes. Data with right answers end with a table."""
    from tokensieve.batch import Job, Place, run
    from tokensieve.batch.source import Columns
    from tokensieve.batch.table import results
    from tokensieve.batch.vllm import available, check
    from tokensieve.evaluate.plan import Settings
    from tokensieve.loading import find
    from tokensieve.methods.spec import expand

    if loading.device.startswith("cuda:"):
        raise Refusal(f"Ray gives each worker its GPUs; leave --device {loading.device} out, or use cuda")
    given: dict[str, Any] = {"budget_scope": budget_scope, "separators": "kept-lines", "positions": "original"}
    specs, options = expand(split_specs(methods), **given, repair=repair, reselect=reselect)
    in_vllm = engine == "vllm" or (engine == "auto" and available())
    job = Job(
        model=model,
        data=data,
        methods=tuple(specs),
        keeps=() if keep is None else tuple(split_budgets(keep)),
        settings=Settings(
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            metric=metric,
            seeds=seeds,
            budget_scope=options["budget_scope"],
            separators="none" if in_vllm else options["separators"],  # vLLM never keeps them
            positions=options["positions"],
            repair=options["repair"],
            reselect=options["reselect"],
            prompt=prompt,
            measure=False,
        ),
        columns=Columns(image_column, question_column, answer_column),
        loading=loading,
        engine="vllm" if in_vllm else "transformers",
        fetch_images=fetch_images,
        rows_per_part=rows_per_part,
    )
    check_scopes(options["budget_scope"], job.entries())  # a bad spec is refused before anything starts
    find(model, loading.revision)
    if job.engine == "vllm":
        try:
            check(job)
        except Refusal as error:
            if engine == "vllm":
                raise
            note(f"note: transformers answers, not vLLM: {error}")
            job = replace(job, engine="transformers", settings=replace(job.settings, separators=options["separators"]))
    if data != "reference":
        note_foreign_images(model)
    with progress() as bar:
        summary = run(job, output, file_format, Place(address, workers, gpus_per_worker), bar)
    table = results(job, output, file_format)
    if json:
        print_json({**summary, "table": None if table is None else [row.to_json() for row in table.rows]})
    elif table is not None:
        print_rows(table)
    pace = f"{summary['rows_of_this_call']:,} now at {summary['rows_per_second']:.3g} rows/s"
    note(f"{summary['rows']:,} rows ({pace}), {summary['errors']:,} with an error")
    note(f"{summary['answers']:,} answers; {summary['tokens_saved']:.0%} of the visual tokens saved")
    note(f"answers: {output}/answers/part-*.{file_format}")
