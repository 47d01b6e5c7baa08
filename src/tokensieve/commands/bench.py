"""``tokensieve bench``: cost and savings of each method on one prompt or batch; under load in ``bench_server.py``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokensieve.commands import bench_server as load
from tokensieve.commands.arguments import (
    KEEPS,
    METHODS,
    BudgetScope,
    Json,
    Keeps,
    Model,
    Repair,
    Separators,
    check_scopes,
    split_budgets,
    split_specs,
    with_load_options,
)
from tokensieve.commands.console import note, print_json, print_table
from tokensieve.commands.loading import inputs_of, note_crowd, note_foreign_images, trained_spec
from tokensieve.loading import LoadOptions, load_model

if TYPE_CHECKING:
    from tokensieve.measure import Cost, Spread

REQUESTS = 1000
TIMES = ("method", "tokens", "prefill ms", "speedup", "ms/token", "speedup", "break-even")
SIZES = ("method", "method ms", "FLOPs", "peak MB", "KV MB", "prompts/s", "tokens/s", "s/1,000 requests", "of full")


@with_load_options()
def bench(
    context: typer.Context,
    loading: LoadOptions,
    model: Model = "reference",
    image: Annotated[Path | None, typer.Option(help="Image file.", show_default="a synthetic one")] = None,
    question: Annotated[str, typer.Option(help="Question about it.")] = "what is in the image?",
    methods: Annotated[
        str,
        typer.Option("--methods", "--method", help="Method specs with commas between: 'vtc-cls, random(seed=1)'."),
    ] = METHODS,
    keep: Keeps = KEEPS,
    budget_scope: BudgetScope = "image",
    separators: Separators = "kept-lines",
    repair: Repair = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Equal prompts per forward.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds timed; each runs every method once.")] = 10,
    answer_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of an answer after its first, for the cost of 1,000 requests.")
    ] = 64,
    server: load.Server = None,
    against: load.Against = None,
    engine: load.Engine = None,
    engine_args: load.EngineArgs = "",
    image_sizes: load.ImageSizes = "336, 672",
    prompt_words: load.PromptWords = "16",
    output_tokens: load.OutputTokens = "16, 128",
    concurrency: load.Concurrency = "1, 8",
    rates: load.Rates = "",
    requests: load.Requests = 32,
    repeat_share: load.RepeatShare = 0.0,
    timeout: load.Timeout = 300.0,
    limit_seconds: load.LimitSeconds = None,
    seed: load.Seed = 0,
    output: load.Output = Path("runs/bench"),
    json: Json = False,
) -> None:
    """Time prefill and decoding, count FLOPs and memory, without and with each method, interleaved.

    With --server or --engine: requests per second and latency under load, of servers, full against reduced.
    """
    if load.check_options(context):
        given = partial(load.if_given, context)
        test = load.LoadTest(
            given("model"),
            given("methods"),
            given("keep"),
            server,
            against,
            engine,
            engine_args,
            image_sizes,
            prompt_words,
            output_tokens,
            concurrency,
            rates,
            repeats,
            requests,
            repeat_share,
            timeout,
            limit_seconds,
            seed,
            output,
        )
        load.bench_under_load(test, json)
        return
    from PIL import Image

    from tokensieve.evaluate import Sample, open_image
    from tokensieve.evaluate.data import check_text
    from tokensieve.evaluate.plan import plan
    from tokensieve.measure import measure_costs
    from tokensieve.methods.spec import expand

    specs, keeps = split_specs(methods), split_budgets(keep)
    specs, options = expand(
        specs, budget_scope=budget_scope, separators=separators, positions="original", repair=repair
    )
    check_scopes(options["budget_scope"], plan(specs, keeps, seeds=1, oracle=False))  # before a model is loaded
    check_text(question, "the question")
    picture = Image.linear_gradient("L").resize((448, 448)).convert("RGB") if image is None else open_image(image)
    vlm, processor = load_model(model, loading, classifiers=True)
    note_crowd(vlm)
    if methods == METHODS and not vlm.can_generate():
        specs = [trained_spec(model, vlm)]
    entries = plan(specs, keeps, seeds=1, oracle=False)
    stages = [run.stages for entry in entries[1:] for run in entry.runs]  # the first entry is the unhooked model
    inputs = inputs_of(vlm, processor, [Sample("bench", lambda: picture, question, ())] * batch_size)
    if image is not None:
        note_foreign_images(model)
    costs = measure_costs(vlm, inputs, stages, processor=processor, repeats=repeats, **options)
    if json:
        print_json([cost.to_json() | _rates(cost, answer_tokens) for cost in costs])
    else:
        print_tables(costs, answer_tokens)
    if costs[0].timing_note:
        note(f"note: {costs[0].timing_note}")


def print_tables(costs: list[Cost], answer_tokens: int) -> None:
    """Print the times and the verdict in one table, work, memory and throughput in another."""
    print_table(TIMES, [_times(cost) for cost in costs])
    print_table(SIZES, [_sizes(cost, costs[0], answer_tokens) for cost in costs])
    generates = costs[0].decode_ms_per_token is not None
    typer.echo(f"in parentheses: quartiles of the paired rounds; batches of {costs[0].prompts}")
    if generates:
        typer.echo(f"a request: the prefill and {answer_tokens} tokens after the first")
        typer.echo("break-even: generated tokens after the first, from which on every longer answer is faster")


def _rates(cost: Cost, answer_tokens: int) -> dict[str, Any]:
    return {
        "prompts_per_second": cost.prompts_per_second,
        "tokens_per_second": cost.tokens_per_second,
        "answer_tokens": answer_tokens,
        "seconds_per_1000_requests": asdict(cost.request_seconds(answer_tokens, REQUESTS)),
    }


def _times(cost: Cost) -> list[str]:
    from tokensieve.measure import two_digits

    full = cost.method == "full"  # its speedups are 1 by definition, and its own times have quartiles
    decode, faster = cost.decode_ms_per_token, cost.decode_speedup
    return [
        cost.method,
        f"{cost.tokens_after:.4g}",
        str(cost.prefill_ms) if full else two_digits(cost.prefill_ms.median),
        "–" if full else _ratio(cost.prefill_speedup),
        "–" if decode is None else str(decode) if full else two_digits(decode.median),
        "–" if full or faster is None else _ratio(faster),
        _break_even(cost),
    ]


def _sizes(cost: Cost, full: Cost, answer_tokens: int) -> list[str]:
    from tokensieve.measure import two_digits

    requests, of_full = cost.request_seconds(answer_tokens, REQUESTS), full.request_seconds(answer_tokens, REQUESTS)
    return [
        cost.method,
        _method_ms(cost),
        f"{cost.flops_ratio:.0%}",
        f"{cost.peak_activation_bytes / 1e6:.3g}",
        "–" if cost.kv_bytes is None else f"{cost.kv_bytes / 1e6:.3g}",
        two_digits(cost.prompts_per_second),
        "–" if cost.tokens_per_second is None else two_digits(cost.tokens_per_second),
        str(requests),
        "100%" if cost is full else _share(requests, of_full.median),
    ]


def _share(part: Spread, whole: float) -> str:
    """Return the share in per cent, if the quartiles lie on one side of 100 %."""
    from tokensieve.measure import two_digits

    if part.low < whole < part.high:
        return "within noise"
    return f"{two_digits(100 * part.median / whole)}%"


def _ratio(spread: Spread) -> str:
    from tokensieve.measure import ratio_digits

    median, low, high = map(ratio_digits, (spread.median, spread.low, spread.high))
    return f"{median}× ({low}–{high})"


def _method_ms(cost: Cost) -> str:
    if cost.method_ms is None:
        return "–"
    return str(cost.method_ms) if cost.method_ms.low > 0 else "within noise"


def _break_even(cost: Cost) -> str:
    from tokensieve.measure import two_digits

    if cost.break_even is None:  # the full model, or a classifier, which generates nothing
        return "–"
    if cost.break_even_tokens is None or cost.break_even != "after":
        return cost.break_even
    low, high = ("∞" if end is None else two_digits(end) for end in (cost.break_even_low, cost.break_even_high))
    return f"{two_digits(cost.break_even_tokens)} ({low}–{high})"
