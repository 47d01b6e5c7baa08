"""Options that several commands share, and the parsing of lists in them."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from tokensieve.budget import Budget, parse_budget
from tokensieve.budget import BudgetScope as Scope
from tokensieve.errors import Refusal
from tokensieve.loading import Dtype, LoadOptions, Quantize

if TYPE_CHECKING:
    from tokensieve.evaluate.plan import Entry

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, all else on stderr.")]
Model: TypeAlias = Annotated[
    str, typer.Option(help="Folder or hub name of a vision-language model; 'reference' is the bundled one.")
]
Data: TypeAlias = Annotated[
    str,
    typer.Option(help="'reference'; a .jsonl, .json, .csv, .tsv or .parquet file; a folder of datasets; a hub name."),
]
Split: TypeAlias = Annotated[
    str | None, typer.Option(help="Split of --data, if it has several.", show_default="the only one")
]
FetchImages: TypeAlias = Annotated[
    bool, typer.Option("--fetch-images", help="Fetch images given as URLs, from any host that the data name.")
]
ImageColumn: TypeAlias = Annotated[str, typer.Option(help="Column of images: files relative to the data, or lists.")]
QuestionColumn: TypeAlias = Annotated[str, typer.Option(help="Column of questions.")]
Prompt: TypeAlias = Annotated[str, typer.Option(help="Text of the user turn; {question} is replaced.")]
Methods: TypeAlias = Annotated[str, typer.Option(help="Method specs with commas between: 'vtc-cls, random(seed=1)'.")]
Keeps: TypeAlias = Annotated[
    str,
    typer.Option("--keep", help="Budgets with commas between: tokens per image (64), shares (11%), rules (layers:64)."),
]
BudgetScope: TypeAlias = Annotated[
    Scope, typer.Option(help="Unit of a budget: each image, all of a sample (by size or by score), each tile…")
]
Separators: TypeAlias = Annotated[
    Literal["kept-lines", "none"],
    typer.Option(help="Newline tokens of a reduced image: those of lines that keep a token, or none, as in vLLM."),
]
Repair: TypeAlias = Annotated[
    Literal["size", "restore"] | None,
    typer.Option(
        help="Repair attention: by the tokens that each one stands for, or also by distance.", show_default="no"
    ),
]
Reselect: TypeAlias = Annotated[
    bool,
    typer.Option("--reselect", help="In a later turn, choose tokens anew by its words, instead of on the first cache."),
]
ImageFile: TypeAlias = Annotated[Path, typer.Argument(help="Image file.", show_default=False)]
Command: TypeAlias = Callable[..., None]

METHODS = "vtc-cls, trsm, fastervlm, divprune, pool, random"
KEEPS = "25%, 11%"

LOADING = "Loading the model"  # heading of these options in --help


def load_options(
    dtype: Annotated[Dtype, typer.Option(help="Precision; auto: float32 on a CPU, else the checkpoint's.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1…; auto: a GPU if there is one.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Spread it over devices: auto, balanced, sequential, or {module: device}.")
    ] = None,
    attn: Annotated[
        str | None, typer.Option(help="Attention: sdpa, eager, flash_attention_2, flex_attention….")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    quantize: Annotated[Quantize | None, typer.Option(help="Quantise the weights with bitsandbytes.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False,
    adapter: Annotated[str | None, typer.Option(help="Folder or hub name of a PEFT adapter, or a bundled one.")] = None,
    processor: Annotated[
        list[str] | None, typer.Option(help="Processor option, e.g. max_pixels=401408; may be repeated.")
    ] = None,
    chat: Annotated[
        list[str] | None, typer.Option(help="Chat template option, e.g. enable_thinking=False; may be repeated.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
) -> LoadOptions:
    """Declare the options of every command that loads a model."""
    return LoadOptions(
        dtype=dtype,
        device=device,
        device_map=_literal(device_map) if device_map and device_map.startswith("{") else device_map,
        attn=attn,
        revision=revision,
        quantize=quantize,
        trust_remote_code=trust_remote_code,
        adapter=adapter,
        processor=_key_values("--processor", processor or []),
        chat=_key_values("--chat", chat or []),
        system=system,
    )


def with_load_options(*names: str) -> Callable[[Command], Command]:
    """Decorate a command: the options of :func:`load_options` take the place of its parameter ``loading``.

    Args:
        names: the options that the command has; none: all.
    """
    parameters = inspect.signature(load_options, eval_str=True).parameters
    shared = [parameter for name, parameter in parameters.items() if name in names or not names]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**values: Any) -> None:
            command(loading=load_options(**{option.name: values.pop(option.name) for option in shared}), **values)

        declared = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "loading"]
        panel = [option.replace(annotation=_in_panel(option.annotation)) for option in shared]
        named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*declared, *panel)]
        run.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]  # typer reads it
        return run

    return decorate


def _in_panel(annotation: Any) -> Any:
    (option,) = annotation.__metadata__
    option.rich_help_panel = LOADING
    return annotation


def _key_values(option: str, items: Sequence[str]) -> dict[str, Any]:
    """Return {key: value} of repeated ``key=value`` options."""
    values: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip().isidentifier():
            raise Refusal(f"{option} takes key=value, as in max_pixels=401408; got {item!r}")
        values[key.strip()] = _literal(text.strip())
    return values


def _literal(text: str) -> Any:
    """Return the value of a Python or JSON literal, or the text itself."""
    for parse in (ast.literal_eval, json.loads):
        with suppress(SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return parse(text)
    return text


def check_scopes(scope: Scope, entries: Iterable[Entry]) -> None:
    """Refuse a budget scope that a method of a plan does not support, before a model is loaded."""
    from tokensieve.engine.budget_scope import check_scope

    for entry in entries:
        for run in entry.runs:
            check_scope(scope, run.stages)


def split_specs(text: str) -> list[str]:
    """Return the method specs between the commas of a text; commas inside parentheses do not separate.

    Raises:
        Refusal: an empty spec.
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return _nonempty([part.strip() for part in parts], "method", text)


def split_budgets(text: str) -> list[Budget]:
    """Return the budgets between the commas of a text; raise :class:`Refusal` naming a part that is no budget."""
    return [parse_budget(part) for part in _nonempty([part.strip() for part in text.split(",")], "budget", text)]


def _nonempty(parts: list[str], kind: str, text: str) -> list[str]:
    if not all(parts):
        raise Refusal(f"a {kind} is missing in {text!r}")
    return parts
