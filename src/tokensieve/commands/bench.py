"""``tokensieve bench``: cost and savings of each method on one prompt or batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokensieve.commands.arguments import (
    KEEPS,
    METHODS,
    BudgetScope,
    Json,
    Keeps,
    Methods,
    Model,
    check_scopes,
    split_budgets,
    split_specs,
    with_load_options,
)
from tokensieve.commands.console import print_json, print_table
from tokensieve.commands.loading import inputs_of, note_foreign_images, trained_spec
from tokensieve.loading import LoadOptions, load_model

if TYPE_CHECKING:
    from tokensieve.measure import Cost

HEADERS = (
    "method", "tokens", "prefill ms", "quartiles", "speedup", "method ms", "ms/token", "FLOPs", "peak MB", "KV MB",
    "break-even",
)  # fmt: skip


@with_load_options()
def bench(
    loading: LoadOptions,
    model: Model = "reference",
    image: Annotated[Path | None, typer.Option(help="Image file.", show_default="a synthetic one")] = None,
    question: Annotated[str, typer.Option(help="Question about it.")] = "what is in the image?",
    methods: Methods = METHODS,
    keep: Keeps = KEEPS,
    budget_scope: BudgetScope = "image",
    batch_size: Annotated[int, typer.Option(min=1, help="Equal prompts per forward.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds timed; methods take turns in each.")] = 10,
    json: Json = False,
) -> None:
    """Time prefill and decoding, count FLOPs and memory, without and with each method, interleaved."""
    from PIL import Image

    from tokensieve.evaluate import Sample, open_image
    from tokensieve.evaluate.plan import plan
    from tokensieve.measure import measure_costs

    specs, keeps = split_specs(methods), split_budgets(keep)
    check_scopes(budget_scope, plan(specs, keeps, seeds=1, oracle=False))  # before a model is loaded
    picture = Image.linear_gradient("L").resize((448, 448)).convert("RGB") if image is None else open_image(image)
    vlm, processor = load_model(model, loading, classifiers=True)
    if methods == METHODS and not vlm.can_generate():
        specs = [trained_spec(model, vlm)]
    entries = plan(specs, keeps, seeds=1, oracle=False)
    stages = [run.stages for entry in entries[1:] for run in entry.runs]  # the first entry is the unhooked model
    inputs = inputs_of(vlm, processor, [Sample("bench", lambda: picture, question, ())] * batch_size)
    if image is not None:
        note_foreign_images(model)
    costs = measure_costs(vlm, inputs, stages, processor=processor, repeats=repeats, budget_scope=budget_scope)
    if json:
        print_json([cost.to_json() for cost in costs])
    else:
        print_table(HEADERS, [_cells(cost) for cost in costs])
        if vlm.can_generate():
            typer.echo(
                "break-even: generated tokens after which a method has paid for itself; 0: its prefill is as fast"
            )


def _cells(cost: Cost) -> list[str]:
    return [
        cost.method,
        f"{cost.tokens_after:.4g}",
        f"{cost.prefill_ms.median:.3g}",
        f"{cost.prefill_ms.low:.3g}–{cost.prefill_ms.high:.3g}",
        f"{cost.prefill_speedup.median:.2f}×",
        "–" if cost.method_ms is None else f"{cost.method_ms.median:.2g}",
        "–" if cost.decode_ms_per_token is None else f"{cost.decode_ms_per_token.median:.3g}",
        f"{cost.flops_ratio:.0%}",
        f"{cost.peak_activation_bytes / 1e6:.3g}",
        "–" if cost.kv_bytes is None else f"{cost.kv_bytes / 1e6:.3g}",
        _break_even(cost),
    ]


def _break_even(cost: Cost) -> str:
    if cost.decode_ms_per_token is None:  # a classifier generates nothing
        return "–"
    return "never" if cost.break_even_tokens is None else f"{cost.break_even_tokens:.4g}"
