"""``tokensieve tune``: the cheapest reduction that keeps the accuracy on your questions, or why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tokensieve.commands.arguments import (
    BudgetScope,
    DataOptions,
    Json,
    Model,
    Prompt,
    Repair,
    Separators,
    check_scopes,
    split_budgets,
    split_specs,
    with_data_options,
    with_load_options,
)
from tokensieve.commands.console import note, print_json, progress
from tokensieve.commands.loading import note_crowd, note_foreign_images
from tokensieve.errors import Refusal
from tokensieve.loading import LoadOptions, load_model

if TYPE_CHECKING:
    from rich.table import Table

    from tokensieve.tune import Finalist, TuneResult

DEFAULT_METHODS, DEFAULT_KEEPS = "one or two of each kind", "50%, 33%, 25%, 16%, 11%"
WIDTH = 100  # of the answer where stdout is no terminal


@with_load_options()
@with_data_options()
def tune(
    *,
    loading: LoadOptions,
    max_drop: Annotated[str, typer.Option(help="Largest drop of accuracy against the full model: 1% or 0.01.")],
    data: DataOptions,
    model: Model = "reference",
    max_latency: Annotated[
        str | None, typer.Option(help="Largest prefill time: 60% of the full model's, or 12ms.", show_default="none")
    ] = None,
    cost: Annotated[
        Literal["flops", "latency"], typer.Option(help="Cheapest in FLOPs of the prefill, or in its measured time.")
    ] = "flops",
    methods: Annotated[
        str | None,
        typer.Option(help="Method specs with commas between; 'all' is every method.", show_default=DEFAULT_METHODS),
    ] = None,
    keep: Annotated[str, typer.Option(help="Budgets with commas between: tokens (64) or shares (11%).")] = (
        DEFAULT_KEEPS
    ),
    trials: Annotated[int, typer.Option(min=1, help="Most configurations.")] = 120,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Largest number of questions, spread over the data.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split into search and held-out questions, and of the order.")] = 0,
    output: Annotated[
        Path, typer.Option(help="Folder of the answers; the same command continues from the files in it.")
    ] = Path("runs/tune"),
    spec_file: Annotated[
        Path | None, typer.Option(help="Spec file of the chosen method.", show_default="best.json in --output")
    ] = None,
    metric: Annotated[str, typer.Option(help="Score of an answer, as in compare.")] = "exact",
    prompt: Prompt = "{question}",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Most questions per forward. Halved where memory runs out.")
    ] = 16,
    budget_scope: BudgetScope = "image",
    separators: Separators = "kept-lines",
    repair: Repair = None,
    json: Json = False,
) -> None:
    """Find the cheapest reduction that keeps the accuracy, prove it on held-out questions, and write its spec file."""
    from tokensieve.evaluate.plan import Settings
    from tokensieve.methods.spec import expand
    from tokensieve.tune.costs import Limit
    from tokensieve.tune.search import check_bound
    from tokensieve.tune.search import tune as search
    from tokensieve.tune.space import METHODS, space

    bound = check_bound(_share(max_drop))
    if max_latency is not None:
        Limit.of(max_latency)  # a bad value is refused before a model is loaded
    specs, keeps = list(METHODS) if methods is None else split_specs(methods), split_budgets(keep)
    specs, options = expand(specs, budget_scope=budget_scope, separators=separators, repair=repair)
    settings = Settings(batch_size=batch_size, max_new_tokens=max_new_tokens, metric=metric, prompt=prompt, **options)
    space(specs, keeps)  # a bad spec is refused before a model is loaded
    named = [spec for spec in specs if spec != "all"]
    check_scopes(settings.budget_scope, settings.plan(named, keeps) if methods is not None else [])
    samples = data.load(limit=questions)
    vlm, processor = load_model(model, loading)
    note_crowd(vlm)
    if not data.bundled:
        note_foreign_images(model)
    with progress() as bar:
        result = search(
            vlm,
            processor,
            samples,
            max_drop=bound,
            output=output,
            max_latency=max_latency,
            cost=cost,
            methods=specs,
            keeps=keeps,
            trials=trials,
            seed=seed,
            settings=settings,
            spec_file=spec_file,
            progress=bar,
        )
    if json:
        print_json(result.to_json())
    else:
        print_answer(result)
    if result.spec_file is not None:
        note(f"spec file: {result.spec_file}")
    note(f"evidence:  {output / 'tune.json'}")


def _share(text: str) -> float:
    """Return a drop of accuracy as typed by a user: ``1%`` or ``0.01``."""
    number = text.strip()
    try:
        return float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        raise Refusal(f"--max-drop is a share such as 1% or 0.01; got {text!r}") from None


def print_answer(result: TuneResult) -> None:
    """Print the verdict with its reason, the judged configurations, and the next step: one screen."""
    import sys

    from rich.console import Console, Group
    from rich.panel import Panel
    from rich.text import Text

    headline = f"Use {result.chosen}" if result.chosen else f"Do not reduce: {result.verdict}"
    parts: list[Text | Table] = [Text(result.why)]
    if result.chosen is not None:
        parts.append(Text(_saving(result.chosen)))
    if result.tested:
        parts += [Text(), _table(result)]
    parts += [Text(), Text(_effort(result), style="dim")]
    if result.spec_file is not None:
        parts.append(Text(f'tokensieve.attach(model, "{result.spec_file}", processor=processor)', style="bold"))
    style = "green" if result.chosen else "yellow"
    width = None if sys.stdout.isatty() else WIDTH
    Console(width=width, highlight=False).print(Panel(Group(*parts), title=Text(headline), border_style=style))


def _saving(chosen: Finalist) -> str:
    cost = chosen.cost
    text = (
        f"It keeps {chosen.tokens_after:.4g} of {chosen.tokens_before:.4g} visual tokens and takes "
        f"{chosen.flops:.0%} of the prefill FLOPs; the measured prefill is {cost.prefill_speedup} times as fast."
    )
    if cost.prefill_speedup.low <= 1:
        text += " On this machine that is no measurable gain."
    return text if cost.timing_note is None else f"{text} {cost.timing_note[:1].upper()}{cost.timing_note[1:]}."


def _table(result: TuneResult) -> Table:
    """Return the held-out evidence: the unreduced model, then the configurations in the order of their judgement."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("held-out questions", overflow="fold")
    for header in ("tokens", "accuracy", "drop", "at most", "lost", "gained", "FLOPs", "prefill", ""):
        table.add_column(header, justify="right", no_wrap=True)
    first = result.tested[0]
    table.add_row("full", f"{first.tokens_before:.4g}", f"{result.full_accuracy:.2%}", *[""] * 4, "100%", "1×", "")
    for finalist in result.tested:
        drop = finalist.drop
        table.add_row(
            Text(str(finalist)),
            f"{finalist.tokens_after:.4g}",
            f"{drop.accuracy:.2%}",
            f"{drop.mean:.2%}",
            f"{drop.high:.2%}",
            f"{drop.lost:.4g}",
            f"{drop.gained:.4g}",
            f"{finalist.flops:.0%}",
            f"{finalist.cost.prefill_speedup.median:.3g}×",
            "holds" if finalist.holds else "fails",
        )
    return table


def _effort(result: TuneResult) -> str:
    text = (
        f"{result.candidates} configurations; {result.search_questions} questions to search, "
        f"{result.held_out_questions} held out; {result.answers:,} answers in all"
    )
    if result.refused:
        count = len(result.refused)
        text += f"; {count} spec{'s' * (count > 1)} refused by this model (tune.json has the reasons)"
    return f"{text}."
