"""``tokensieve compare``: many methods at many budgets on one data set."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tokensieve.commands.arguments import (
    KEEPS,
    METHODS,
    BudgetScope,
    Json,
    Keeps,
    Methods,
    Model,
    convention,
    split_budgets,
    split_specs,
)
from tokensieve.commands.console import note, print_json, print_table, progress
from tokensieve.commands.loading import COMPARED_WITH, load_model, trained_spec


def compare(
    model: Model = "reference",
    unreduced: Annotated[
        str | None,
        typer.Option(help="The unreduced fine-tune that --model, fine-tuned with PuMer, is compared with."),
    ] = None,
    data: Annotated[
        str, typer.Option(help="'reference' for the bundled benchmark, or a .jsonl, .csv or .parquet file.")
    ] = "reference",
    methods: Methods = METHODS,
    keep: Keeps = KEEPS,
    budget_scope: BudgetScope = "image",
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many questions, spread over the data.", show_default="all")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the results; the same command continues what lies there.")
    ] = Path("runs/compare"),
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per forward.")] = 16,
    metric: Annotated[str, typer.Option(help="How answers are scored.")] = "exact",
    image_column: Annotated[str, typer.Option(help="Column of image files, relative to the data file.")] = "image",
    question_column: Annotated[str, typer.Option(help="Column of questions.")] = "question",
    answer_column: Annotated[str, typer.Option(help="Column of answers: a text, or a list of them.")] = "answer",
    prompt: Annotated[str, typer.Option(help="What the user says; {question} is replaced.")] = "{question}",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    budget: Annotated[
        str, typer.Option(help="What --keep counts: 'kept' tokens, or 'average' over the LLM's blocks.")
    ] = "kept",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of a method that draws at random.")] = 3,
    measure: Annotated[bool, typer.Option(help="Measure FLOPs, latency and memory, too.")] = True,
    report: Annotated[bool, typer.Option(help="Write report.html (needs the 'report' extra).")] = True,
    json: Json = False,
) -> None:
    """Compare methods: accuracy, tokens, FLOPs, latency and memory. Writes results.json and report.html."""
    from tokensieve.engine.connector.decide import check_scope
    from tokensieve.evaluate import Results, load_data
    from tokensieve.evaluate import compare as run
    from tokensieve.evaluate.plan import plan

    specs, keeps = split_specs(methods), split_budgets(keep)
    counted = convention(budget)
    for entry in plan(specs, keeps, seeds=seeds, oracle=False, budget=counted):  # a bad spec is refused before it loads
        for each in entry.runs:
            check_scope(budget_scope, each.stages)
    if report:
        from tokensieve.report.extra import check_report_extra

        check_report_extra()
    columns = {"image_column": image_column, "question_column": question_column, "answer_column": answer_column}
    samples = load_data(data, **columns, limit=limit)
    vlm, processor = load_model(model, classifiers=True)
    if methods == METHODS and not vlm.can_generate():
        specs = [trained_spec(model, vlm)]
    trained = None
    if unreduced := unreduced or COMPARED_WITH.get(model):
        trained, (vlm, processor) = vlm, load_model(unreduced, classifiers=True)
    with progress() as bar:
        rows = run(
            vlm,
            processor,
            samples,
            specs,
            keeps,
            output=output,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            metric=metric,
            seeds=seeds,
            budget=counted,
            budget_scope=budget_scope,
            prompt=prompt,
            trained=trained,
            measure=measure,
            progress=bar,
        )
    results = Results.load(output / "results.json")
    if json:
        print_json([row.to_json() for row in rows])
    else:
        from tokensieve.report.table import COLUMNS, as_rows

        print_table(
            [header for header, _, _ in COLUMNS], [[cell(row) for *_, cell in COLUMNS] for row in as_rows(results)]
        )
    note(f"results: {output / 'results.json'}")
    if report:
        from tokensieve.report.html import write_report
        from tokensieve.report.overlay import as_seen

        command = shlex.join(["tokensieve", *sys.argv[1:]])
        page = write_report(results, output, crop=partial(as_seen, processor=processor), command=command)
        note(f"report:  {page}")
