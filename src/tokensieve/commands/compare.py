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
    FetchImages,
    ImageColumn,
    Json,
    Keeps,
    Methods,
    Model,
    Prompt,
    QuestionColumn,
    Repair,
    Reselect,
    Separators,
    Split,
    check_scopes,
    split_budgets,
    split_specs,
    with_load_options,
)
from tokensieve.commands.console import in_all_processes, note, print_json, print_lines, print_table, progress
from tokensieve.commands.loading import COMPARED_WITH, note_crowd, note_foreign_images, trained_spec
from tokensieve.errors import Refusal
from tokensieve.loading import LoadOptions, load_model

COMPARED = f"{METHODS}, downsample"  # the referee's hard questions are those that downsample gets wrong


@with_load_options()
@in_all_processes
def compare(
    loading: LoadOptions,
    model: Model = "reference",
    unreduced: Annotated[
        str | None,
        typer.Option(help="The unreduced fine-tune that --model, fine-tuned with PuMer, is compared with."),
    ] = None,
    data: Data = "reference",
    split: Split = None,
    fetch_images: FetchImages = False,
    methods: Methods = COMPARED,
    keep: Keeps = KEEPS,
    keep_means: Annotated[
        Literal["final", "average"],
        typer.Option(help="Meaning of --keep inside the LLM: final tokens, or the average over its layers."),
    ] = "final",
    budget_scope: BudgetScope = "image",
    separators: Separators = "kept-lines",
    repair: Repair = None,
    reselect: Reselect = False,
    types: Annotated[
        str | None, typer.Option(help="Question types to keep, with commas between.", show_default="all")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Largest number of questions, spread over the data.", show_default="all")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the results; the same command continues from the files in it.")
    ] = Path("runs/compare"),
    batch_size: Annotated[
        str, typer.Option(help="Most questions per forward, or 'auto'. Halved where they do not fit into memory.")
    ] = "16",
    metric: Annotated[
        str,
        typer.Option(
            help="Score of an answer: exact (equal), contains (occurs in it), vqa (several annotators), anls (DocVQA), "
            "relaxed (5 % for numbers, ChartQA), choice (letter of an option), yes_no (POPE, with F1); as official "
            "scripts read answers: yes_no_prefix (MME), gqa (GQA), letter (SEED), scienceqa (ScienceQA) or mmbench "
            "(MMBench)."
        ),
    ] = "exact",
    image_column: ImageColumn = "image",
    question_column: QuestionColumn = "question",
    answer_column: Annotated[str, typer.Option(help="Column of answers: a text, or a list of them.")] = "answer",
    prompt: Prompt = "{question}",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of a method that draws at random.")] = 5,
    measure: Annotated[bool, typer.Option(help="Measure FLOPs, latency and memory, too.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="End at the first image that cannot be read.")] = False,
    referee: Annotated[
        bool, typer.Option(help="Also answer without the images (blind), and with the example images moved a little.")
    ] = True,
    report: Annotated[bool, typer.Option(help="Write report.html (needs the 'report' extra).")] = True,
    json: Json = False,
) -> None:
    """Compare methods: accuracy, tokens, FLOPs, latency and memory. Writes results.json and report.html."""
    from tokensieve.evaluate import load_data
    from tokensieve.evaluate.compare import Comparison
    from tokensieve.evaluate.data import types_known_to
    from tokensieve.evaluate.plan import Settings
    from tokensieve.evaluate.processes import Processes
    from tokensieve.evaluate.results import RESULTS, skipped_note
    from tokensieve.methods.spec import expand

    specs, keeps = split_specs(methods), split_budgets(keep)
    specs, options = expand(
        specs,
        budget_scope=budget_scope,
        separators=separators,
        positions="original",
        repair=repair,
        reselect=reselect,
    )
    settings = Settings(
        batch_size=_batch_size(batch_size),
        max_new_tokens=max_new_tokens,
        metric=metric,
        seeds=seeds,
        keep_means=keep_means,
        prompt=prompt,
        measure=measure,
        strict=strict,
        **options,
        referee=referee,
    )
    check_scopes(settings.budget_scope, settings.plan(specs, keeps))  # a bad spec is refused before a model is loaded
    if report:
        from tokensieve.report.extra import check_report_extra

        check_report_extra()
    load = partial(
        load_data,
        data,
        image_column=image_column,
        question_column=question_column,
        answer_column=answer_column,
        split=split,
        fetch_images=fetch_images,
        limit=limit,
    )
    chosen_types = None if types is None else [name for text in types.split(",") if (name := text.strip())]
    samples = load(types=chosen_types)  # a mistake in the data is found before a model is loaded
    vlm, processor = load_model(model, loading, classifiers=True)
    if chosen_types is None and (known := types_known_to(vlm, data)):
        samples = load(types=known)
    note_crowd(vlm)
    if methods == COMPARED:
        specs = _default_specs(model, vlm)
    trained = None
    if unreduced := unreduced or COMPARED_WITH.get(model):
        # the unreduced fine-tune is another checkpoint: the revision and the adapter are those of --model
        shared = replace(loading, revision=None, adapter=None)
        trained, (vlm, processor) = vlm, load_model(unreduced, shared, classifiers=True)
    processes = Processes.launched()
    comparison = Comparison(vlm, processor, samples, settings, trained, loading, processes)
    if processes.count > 1:
        note(f"{processes.count} processes share the questions")
    if data != "reference":
        note_foreign_images(model)
    with progress() as bar:
        results = comparison.run(specs, keeps, output, bar)
    if not processes.first:
        return
    if results.skipped:
        note(skipped_note(results))
    if json:
        print_json([row.to_json() for row in results.rows])
        if results.rows[0].timing_note:
            note(f"note: {results.rows[0].timing_note}")
    else:
        print_rows(results)
    note(f"results: {output / RESULTS}")
    if report:
        note(f"report:  {_write_report(results, output, processor)}")


def _default_specs(name: str, vlm: Any) -> list[str]:
    """Return the methods that are compared by default; without downsample where the model cannot resize images."""
    from tokensieve.engine import attach

    if not vlm.can_generate():
        return [trained_spec(name, vlm)]
    try:
        attach(vlm, "downsample").detach()
    except Refusal:
        return split_specs(METHODS)
    return split_specs(COMPARED)


def _batch_size(text: str) -> int | Literal["auto"]:
    if text != "auto" and not text.isdecimal():
        raise Refusal(f"--batch-size is 'auto' or a number; got {text!r}")
    return "auto" if text == "auto" else int(text)


def print_rows(results: Any) -> None:
    """Print the decision, then two tables that fit 100 columns: accuracy, and costs if they were measured."""
    from tokensieve.report.decision import Decision
    from tokensieve.report.referee import GUARD, brief
    from tokensieve.report.remarks import warnings
    from tokensieve.report.table import ACCURACY, COSTS, KEEP, METHOD

    decision = Decision(results)
    print_lines([*warnings(decision), *decision.sentences(), *brief(decision)])
    guarded = any(line.row.referee and line.row.referee.guards for line in decision.lines)
    accuracy = (*ACCURACY[:-1], GUARD, ACCURACY[-1]) if guarded else ACCURACY
    for columns in (accuracy, COSTS) if decision.measured else (accuracy,):
        shown = (METHOD, KEEP, *(column for column in columns if not column.page_only))
        rows = [[column.text(line) for column in shown] for line in decision.lines]
        headers = [column.header for column in shown]
        for i, header in enumerate(headers):
            if len(header) > max(len(row[i]) for row in rows):
                headers[i] = header.replace(" ", "\n")  # the words on two lines keep the column narrow
        print_table(headers, rows)


def _write_report(results: Any, folder: Path, processor: Any) -> Path:
    from tokensieve.report.html import write_report
    from tokensieve.report.overlay import as_seen

    command = shlex.join(["tokensieve", *sys.argv[1:]])
    return write_report(results, folder, crop=partial(as_seen, processor=processor), command=command)
