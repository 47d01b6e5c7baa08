"""``tokensieve reproduce``: a published row run again, beside the published number."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokensieve.commands.arguments import Json, with_load_options
from tokensieve.commands.console import in_all_processes, note, print_json, print_table, progress
from tokensieve.errors import Refusal
from tokensieve.loading import LoadOptions, load_model

if TYPE_CHECKING:
    from tokensieve.reproduce import Target
    from tokensieve.reproduce.run import Reproduction

OUTPUT = Path("runs/reproduce")


@with_load_options()
@in_all_processes
def reproduce(
    loading: LoadOptions,
    row: Annotated[
        str | None,
        typer.Argument(help="model/benchmark/method@tokens; without it, everything is listed.", show_default=False),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the benchmarks and the published rows.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Folder of the model, or another hub name.", show_default="the recipe's")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the benchmark's files, as on the hub.", show_default="fetched")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Largest number of questions, chosen at random.", show_default="all")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; the same command continues.", show_default=str(OUTPUT / "ROW")),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be fetched and run, and a prompt.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Most questions per forward.")] = 16,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of random selection.")] = 1,
    json: Json = False,
) -> None:
    """Run a published row again under the paper's protocol: our number beside the paper's, and whether they agree."""
    from tokensieve.reproduce import find_target

    if row is None or listing:
        _print_list(row, json)
        return
    target = find_target(row)
    name = model or target.model.hub
    folder = output or OUTPUT / row.replace("/", "-").replace(" ", "")
    if dry_run:
        _print_plan(target, name, data, limit, folder, json)
        return
    from tokensieve.reproduce.files import fetch
    from tokensieve.reproduce.run import reproduce as run

    source = fetch(target.benchmark, note) if data is None else data
    if loading.system is None:
        loading = replace(loading, system=target.model.system)
    vlm, processor = load_model(name, loading)
    settings = {"batch_size": batch_size, "seeds": seeds}
    with progress() as bar:
        done = run(
            target, vlm, processor, output=folder, data=source, limit=limit, settings=settings, loading=loading,
            progress=bar,
        )  # fmt: skip
    if json:
        print_json(asdict(done))
    else:
        _print_result(target, done)
    note(f"results: {folder}")


def _print_list(row: str | None, json: bool) -> None:
    from tokensieve.reproduce import BENCHMARKS, published_rows

    rows = [entry for entry in published_rows() if row is None or row in entry.name]
    if not rows:
        raise Refusal(f"no published row with {row!r} in its name")
    if json:
        print_json([{"name": entry.name, **asdict(entry)} for entry in rows])
        return
    if row is None:
        lines = []
        for name, benchmark in BENCHMARKS.items():
            scored = ("", "") if benchmark.judge else (benchmark.metric, benchmark.total)
            lines.append(
                (name, benchmark.title, f"{benchmark.questions:,}", *scored, benchmark.judge or benchmark.differs)
            )
        print_table(("benchmark", "title", "rows", "metric", "total", "no verdict"), lines, left=6)
    sources = list(dict.fromkeys(entry.source for entry in rows))
    width = max(len(entry.name) for entry in rows)
    for entry in rows:
        full = "" if entry.full is None else f"{entry.full:g}"
        typer.echo(f"{entry.name:{width}} {entry.value:>7g} {full:>7} [{sources.index(entry.source) + 1}]")
    typer.echo("(name, published number, full model in the same table, source)")
    for number, source in enumerate(sources, 1):
        typer.echo(f"[{number}] {source}")
    typer.echo("'tokensieve reproduce NAME --dry-run' shows what a row fetches and runs.")


def _print_plan(target: Target, model: str, data: Path | None, limit: int | None, output: Path, json: bool) -> None:
    """Print what would be fetched and run. Nothing is fetched but the list of files."""
    from tokensieve.reproduce.files import on_the_hub
    from tokensieve.reproduce.run import RANDOM, conversation
    from tokensieve.reproduce.samples import questions

    benchmark = target.benchmark
    place = "/".join(filter(None, (benchmark.config, benchmark.split)))
    facts: dict[str, Any] = {"row": target.name, "model": model}
    if data is None:
        facts |= {"data": f"{benchmark.dataset} ({place}), {on_the_hub(benchmark)}"}
        facts |= {"questions": f"{benchmark.questions if limit is None else min(limit, benchmark.questions):,}"}
        text = benchmark.prompt
    else:
        chosen = questions(benchmark, data, limit=limit)
        facts |= {"data": f"{data} ({place})", "questions": f"{len(chosen.samples):,} of {chosen.total:,}"}
        text = chosen.samples[0].text
    method = target.method if target.tokens is None else f"{target.method} at {target.tokens} tokens"
    facts |= {
        "rows": "full" if target.tokens is None else f"full, {method}, {RANDOM}",
        "budget": target.budget_text,
        "positions": "contiguous, as in the authors' code" if target.renumbers else "original",
        "metric": (
            f"none here: the answers are written for {benchmark.judge}"
            if benchmark.judge
            else f"{benchmark.metric}, then {benchmark.total} × {benchmark.scale:g}"
        ),
        "longest answer": f"{benchmark.max_new_tokens} tokens, greedy",
        "images": "padded to a square" if target.model.square else "as they are",
        "output": str(output),
        "published": [f"{row.value:g} ({row.source})" for row in target.published] or ["no number"],
        "notes": [text for text in (benchmark.differs, benchmark.note) if text],
        "prompt": conversation(target.model, text),
    }
    if json:
        print_json(facts)
        return
    for label, fact in facts.items():
        for line in fact if isinstance(fact, list) else [fact]:
            typer.echo(f"{label:15} {line}")


def _print_result(target: Target, done: Reproduction) -> None:
    """Print the measured numbers, then each published one with its verdict."""
    sources = list(dict.fromkeys(f"{row.source} {row.note}".strip() for row, _ in done.absolute))
    if done.numbers:
        lines = []
        for number in done.numbers:
            relative = "" if number.relative is None else _interval(*number.relative)
            value = _interval(number.value, number.low, number.high)
            lines.append((number.method, f"{number.tokens:.4g}", str(done.samples), value, relative))
        print_table(("row", "tokens", "questions", target.benchmark.title, "% of full"), lines)
    for kind, verdicts in (("", done.absolute), (" % of full", done.relative)):
        for row, verdict in verdicts:
            place = sources.index(f"{row.source} {row.note}".strip()) + 1
            measured = f", ours {_interval(verdict.value, verdict.low, verdict.high)}" if done.numbers else ""
            reason = f": {verdict.reason}" if verdict.reason else ""
            typer.echo(f"published {verdict.published:.5g}{kind} [{place}]{measured}")
            typer.echo(f"  {verdict.answer}{reason}")
    for place, source in enumerate(sources, 1):
        typer.echo(f"[{place}] {source}")
    if not done.absolute:
        typer.echo(f"{target.name}: no published number")
    for path in done.answer_files:
        typer.echo(f"answers for {target.benchmark.judge}: {path}")


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.1f} ({low:.1f} to {high:.1f})"
