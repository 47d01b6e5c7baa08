"""``tokensieve bench --server`` and ``--engine``: requests per second and latency under load, full against reduced."""

from __future__ import annotations

import asyncio
import json as json_module
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

from tokensieve.budget import check_number
from tokensieve.commands.arguments import split_budgets, split_specs
from tokensieve.commands.console import note, print_json
from tokensieve.commands.load_table import print_results, ratio, sentences
from tokensieve.errors import OutputError, Refusal

if TYPE_CHECKING:
    from tokensieve.load import Cell, CellResult, Journal, Plan, Side

UNDER_LOAD = "Under load"  # heading of these options in --help
RESULTS = "load.json"
Number = TypeVar("Number", int, float)


def _option(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=UNDER_LOAD, **more)


Server: TypeAlias = Annotated[
    str | None, _option("Address of an OpenAI-compatible server that reduces, per server or per request.")
]
Against: TypeAlias = Annotated[
    str | None,
    _option("Address of the same server without reduction. Without it, --server gets the budget in each request."),
]
Engine: TypeAlias = Annotated[
    str | None, _option("Start both servers on this engine, vllm or transformers, with --model, --method and --keep.")
]
EngineArgs: TypeAlias = Annotated[str, _option("Further options of both servers, such as '--max-model-len 4096'.")]
ImageSizes: TypeAlias = Annotated[str, _option("Pixels with commas between, such as '336, 672x448'.")]
PromptWords: TypeAlias = Annotated[str, _option("Words of the question, with commas between.")]
OutputTokens: TypeAlias = Annotated[str, _option("Tokens of a reply, with commas between.")]
Concurrency: TypeAlias = Annotated[
    str, _option("Closed loops: users that send their next request when the previous one has ended; '' for none.")
]
Rates: TypeAlias = Annotated[str, _option("Open loops: mean Poisson arrivals per second, with commas between.")]
Requests: TypeAlias = Annotated[int, _option("Requests of a run; at least four for each user.", min=1)]
RepeatShare: TypeAlias = Annotated[
    float, _option("Share of requests whose image was sent before, so that caches hit.", min=0, max=1)
]
Timeout: TypeAlias = Annotated[float, _option("Seconds after which a request has failed.", min=0.1)]
LimitSeconds: TypeAlias = Annotated[
    float | None, _option("Stop after this time; what was measured is kept.", min=0, show_default="no limit")
]
Seed: TypeAlias = Annotated[int, _option("Seed of the arrivals.", min=0)]
Output: TypeAlias = Annotated[Path, _option("Folder of the results; the same command continues from the files in it.")]

# options of bench that mean the same under load; all others are refused there
SHARED = {"model", "methods", "keep", "repeats", "json"}
LOAD_ONLY = {"against", "engine_args", "image_sizes", "prompt_words", "output_tokens", "concurrency", "rates",
             "requests", "repeat_share", "timeout", "limit_seconds", "seed", "output"}  # fmt: skip


@dataclass(frozen=True)
class LoadTest:
    """The options of a load test. ``None`` stands for an option that was not given."""

    model: str | None
    method: str | None
    keep: str | None
    server: str | None
    against: str | None
    engine: str | None
    engine_args: str
    image_sizes: str
    prompt_words: str
    output_tokens: str
    concurrency: str
    rates: str
    rounds: int
    requests: int
    repeat_share: float
    timeout: float
    limit_seconds: float | None
    seed: int
    output: Path


def check_options(context: typer.Context) -> bool:
    """Return whether bench runs under load; refuse options that belong to the other kind."""
    given = {name for name in context.params if _given(context, name)}
    under_load = {"server", "engine"} & given
    if not under_load:
        foreign, place = given & LOAD_ONLY, "needs --server or --engine"
    else:
        foreign = given - SHARED - LOAD_ONLY - {"server", "engine"}
        place = "has no meaning with --server or --engine (options of a server: --engine-args)"
    if foreign:
        name = min(foreign, key=list(context.params).index)  # the first in the order of --help
        raise Refusal(f"{_flag(name)} {place}")
    return bool(under_load)


def if_given(context: typer.Context, name: str) -> Any:
    """Return the value of an option, ``None`` if the command line does not have it."""
    return context.params[name] if _given(context, name) else None


def bench_under_load(test: LoadTest, json: bool) -> None:
    """Measure the grid, print a table and the break-even, and write both beside the rounds."""
    from tokensieve.load import Journal, Plan, grid, parse_sizes

    cells = grid(
        parse_sizes(test.image_sizes),
        _numbers("--prompt-words", test.prompt_words, int, 1),
        _numbers("--output-tokens", test.output_tokens, int, 1),
        _numbers("--concurrency", test.concurrency, int, 1),
        _numbers("--rates", test.rates, float, 1e-3),
    )
    plan = Plan(test.rounds, test.requests, test.repeat_share, test.seed, test.timeout)
    with _addresses(test) as (full, reduced, label):
        full, reduced = asyncio.run(_probed(full, reduced, cells[0], test))
        journal = Journal(test.output, _setup(full, reduced, label, plan))
        code = _measure(full, reduced, cells, plan, journal, test)
    results = _results(journal, cells)
    if not results:
        note(f"tokensieve: no round was finished; the same command starts again from {test.output}")
        raise typer.Exit(code or 2)
    lines = sentences(results, full, reduced)
    report = {"setup": _setup(full, reduced, label, plan), "cells": [asdict(row) for row in results], "summary": lines}
    _write(test.output / RESULTS, report)
    if json:
        print_json(report)
    else:
        print_results(results, lines)
    note(f"results: {test.output / RESULTS}")
    if code:
        raise typer.Exit(code)


@contextmanager
def _addresses(test: LoadTest) -> Iterator[tuple[Side, Side, str]]:
    """Yield the full and the reduced side, and a label of both for the set-up, while their servers run."""
    from tokensieve.load import Side, base_url, launched, launches

    if test.engine is not None:
        if test.server is not None or test.against is not None:
            raise Refusal("--engine starts both servers itself; leave out --server and --against")
        import torch

        method, keep = _only("--method", split_specs(_needed("--method", test))), _budget(_needed("--keep", test))
        words, gpu = shlex.split(test.engine_args), torch.cuda.is_available()
        model = _needed("--model", test)
        pair = launches(test.engine, model, method, keep, words, gpu=gpu)
        if gpu and test.engine == "vllm":
            note("note: the two servers share the GPU: each gets half of its memory (--gpu-memory-utilization)")
        with launched(pair, test.output, tell=note) as (full_url, reduced_url):
            label = f"{test.engine}, {method}, keep {keep} {test.engine_args}".strip()
            # each server lists its one model, under a name that the engine chooses
            yield Side("full", full_url, ""), Side("reduced", reduced_url, ""), label
        return
    server, model = base_url("--server", str(test.server)), test.model or ""
    if test.against is not None:
        if test.method is not None or test.keep is not None:
            raise Refusal("with --against each server has its own method and budget; leave out --method and --keep")
        against = base_url("--against", test.against)
        yield Side("full", against, model), Side("reduced", server, model), f"{server} (reduced), {against} (full)"
        return
    budget = _budget(_needed("--keep", test))
    reduced: dict[str, Any] = {"tokensieve_keep": budget}
    if test.method is not None:
        reduced["tokensieve_method"] = _only("--method", split_specs(test.method))
    side = Side("full", server, model, {"mm_processor_kwargs": {"tokensieve_keep": 1.0}})
    yield (
        side,
        Side("reduced", server, model, {"mm_processor_kwargs": reduced}),
        f"{server}, {json_module.dumps(reduced)} in each request",
    )


async def _probed(full: Side, reduced: Side, cell: Cell, test: LoadTest) -> tuple[Side, Side]:
    """Return both sides as their servers take them; say what the comparison cannot do there."""
    from tokensieve.load import probe, reads_budgets, same_fields

    (full, full_tokens), (reduced, reduced_tokens) = [
        await probe(side, cell, timeout=test.timeout) for side in (full, reduced)
    ]
    full, reduced = same_fields(full, reduced)
    if "ignore_eos" not in full.fields:
        note("note: a server does not take ignore_eos: replies can end early; their measured lengths are reported")
    if full_tokens is not None and full_tokens == reduced_tokens:
        same = f"both sides count {full_tokens} prompt tokens for the same request"
        # transformers' own server counts the prompt before it is reduced, so equal counts alone prove nothing
        if "mm_processor_kwargs" in full.fields and not await reads_budgets(full, cell, timeout=test.timeout):
            raise Refusal(
                f"{same}: {full.url} ignores mm_processor_kwargs; start it with the plug-in and "
                "--trust-request-mm-kwargs, or compare two servers with --against"
            )
        note(f"note: {same}: nothing is reduced, or the server counts before it reduces")
    return full, reduced


def _measure(full: Side, reduced: Side, cells: Sequence[Cell], plan: Plan, journal: Journal, test: LoadTest) -> int:
    """Measure until the grid, the time or the user's patience ends; return the exit code."""
    from tokensieve.load import measure

    async def within_the_limit() -> list[str]:
        work = measure(full, reduced, cells, plan, journal, finished=lambda cell: _tell(journal, cell))
        return await asyncio.wait_for(work, test.limit_seconds)

    try:
        skipped = asyncio.run(within_the_limit())
    except (TimeoutError, asyncio.TimeoutError):  # two classes on Python 3.10
        note(f"note: stopped after --limit-seconds {test.limit_seconds:g}; the same command continues")
        return 0
    except KeyboardInterrupt:
        note("tokensieve: interrupted; resume with the same command")
        return 130
    for reason in skipped:
        note(f"note: not measured: {reason}")
    if len(skipped) == len(cells):
        raise Refusal(f"no cell of the grid can be measured; the first: {skipped[0]}")
    return 0


def _results(journal: Journal, cells: Sequence[Cell]) -> list[CellResult]:
    from tokensieve.load import result_of

    runs: dict[Any, list[Any]] = defaultdict(list)
    for record in journal.records:
        runs[record.cell].append(record.figures)
    return [
        result_of(cell, [pair["full"] for pair in runs[cell]], [pair["reduced"] for pair in runs[cell]])
        for cell in cells
        if cell in runs
    ]


def _tell(journal: Journal, cell: Cell) -> None:
    """Print the verdict on a finished cell, so that a long run shows what it found so far."""
    (row,) = _results(journal, [cell])
    note(f"{cell}: {row.verdict}; requests/s {ratio(row.throughput)}")


def _setup(full: Side, reduced: Side, label: str, plan: Plan) -> dict[str, Any]:
    """Return what a resumed run must have in common with the rounds in the folder; the grid can grow."""
    return {
        "version": 1,
        "servers": label,
        "models": [full.model, reduced.model],
        "fields": [dict(full.fields), dict(reduced.fields)],
        **{key: value for key, value in asdict(plan).items() if key != "rounds"},
    }


def _numbers(option: str, text: str, kind: Callable[[str], Number], least: float) -> list[Number]:
    """Return the numbers between the commas of a text; an empty text has none."""
    numbers = []
    for part in text.split(",") if text.strip() else ():
        try:
            number = kind(part)
        except ValueError:
            number = kind("0")
        if not least <= number < float("inf"):
            raise Refusal(f"{option} takes numbers from {least:g} on with commas between; got {part.strip()!r}")
        numbers.append(number)
    return list(dict.fromkeys(numbers))


def _budget(text: str) -> int | float:
    """Return the one budget. It is a number, because a request to a server names it."""
    return check_number(_only("--keep", split_budgets(text)))


Item = TypeVar("Item")


def _only(option: str, items: Sequence[Item]) -> Item:
    if len(items) != 1:
        raise Refusal(f"under load, {option} takes one value, which is compared with the full model; got {len(items)}")
    return items[0]


def _needed(option: str, test: LoadTest) -> str:
    value: str | None = getattr(test, option.removeprefix("--"))
    if value is None:
        where = f"--engine {test.engine}" if test.engine else "--server without --against"
        raise Refusal(f"{where} needs {option}")
    return value


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json_module.dumps(report, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; the rounds beside it are kept") from error
