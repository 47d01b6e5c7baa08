"""``tokensieve compare``: many methods at many budgets on one data set."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tokensieve.commands.arguments import (
    KEEPS,
    METHODS,
    BudgetScope,
    Data,
    ImageColumn,
    Json,
    Keeps,
    Methods,
    Model,
    Prompt,
    QuestionColumn,
    check_scopes,
    split_budgets,
    split_specs,
    with_load_options,
)
from tokensieve.commands.console import note, print_json, print_table, progress
from tokensieve.commands.loading import COMPARED_WITH, note_foreign_images, trained_spec
from tokensieve.loading import LoadOptions, load_model


@with_load_options()
def compare(
    loading: LoadOptions,
    model: Model = "reference",
    unreduced: Annotated[
        str | None,
        typer.Option(help="The unreduced fine-tune that --model, fine-tuned with PuMer, is compared with."),
    ] = None,
    data: Data = "reference",
    methods: Methods = METHODS,
    keep: Keeps = KEEPS,
    keep_means: Annotated[
        Literal["final", "average"],
        typer.Option(help="Meaning of --keep inside the LLM: final tokens, or the average over its layers."),
    ] = "final",
    budget_scope: BudgetScope = "image",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Largest number of questions, spread over the data.", show_default="all")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the results; the same command continues from the files in it.")
    ] = Path("runs/compare"),
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per forward.")] = 16,
    metric: Annotated[str, typer.Option(help="Score of an answer: exact, contains or vqa.")] = "exact",
    image_column: ImageColumn = "image",
    question_column: QuestionColumn = "question",
    answer_column: Annotated[str, typer.Option(help="Column of answers: a text, or a list of them.")] = "answer",
    prompt: Prompt = "{question}",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of a method that draws at random.")] = 3,
    measure: Annotated[bool, typer.Option(help="Measure FLOPs, latency and memory, too.")] = True,
    report: Annotated[bool, typer.Option(help="Write report.html (needs the 'report' extra).")] = True,
    json: Json = False,
) -> None:
    """Compare methods: accuracy, tokens, FLOPs, latency and memory. Writes results.json and report.html."""
    from tokensieve.evaluate import Results, load_data
    from tokensieve.evaluate.compare import RESULTS, Comparison
    from tokensieve.evaluate.plan import Settings

    specs, keeps = split_specs(methods), split_budgets(keep)
    settings = Settings(
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        metric=metric,
        seeds=seeds,
        keep_means=keep_means,
        budget_scope=budget_scope,
        prompt=prompt,
        measure=measure,
    )
    check_scopes(budget_scope, settings.plan(specs, keeps))  # a bad spec is refused before a model is loaded
    if report:
        from tokensieve.report.extra import check_report_extra

        check_report_extra()
    columns = {"image_column": image_column, "question_column": question_column, "answer_column": answer_column}
    samples = load_data(data, **columns, limit=limit)
    vlm, processor = load_model(model, loading, classifiers=True)
    if methods == METHODS and not vlm.can_generate():
        specs = [trained_spec(model, vlm)]
    trained = None
    if unreduced := unreduced or COMPARED_WITH.get(model):
        # the unreduced fine-tune is another checkpoint: the revision and the adapter are those of --model
        shared = replace(loading, revision=None, adapter=None)
        trained, (vlm, processor) = vlm, load_model(unreduced, shared, classifiers=True)
    comparison = Comparison(vlm, processor, samples, settings, trained, loading)
    if data != "reference":
        note_foreign_images(model)
    with progress() as bar:
        rows = comparison.run(specs, keeps, output, bar)
    results = Results.load(output / RESULTS)
    if json:
        print_json([row.to_json() for row in rows])
    else:
        _print_rows(results)
    note(f"results: {output / RESULTS}")
    if report:
        note(f"report:  {_write_report(results, output, processor)}")


def _print_rows(results: Any) -> None:
    from tokensieve.report.table import COLUMNS, as_rows

    headers = [header for header, _, _ in COLUMNS]
    print_table(headers, [[cell(row) for *_, cell in COLUMNS] for row in as_rows(results)])


def _write_report(results: Any, folder: Path, processor: Any) -> Path:
    from tokensieve.report.html import write_report
    from tokensieve.report.overlay import as_seen

    command = shlex.join(["tokensieve", *sys.argv[1:]])
    return write_report(results, folder, crop=partial(as_seen, processor=processor), command=command)
