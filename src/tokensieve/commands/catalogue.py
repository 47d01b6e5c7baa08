"""``tokensieve methods`` and ``tokensieve models``: lists of the methods and of the supported families."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from tokensieve.commands.arguments import Json
from tokensieve.commands.console import print_json, print_table
from tokensieve.errors import Refusal
from tokensieve.version import tested_range

if TYPE_CHECKING:
    from tokensieve.methods import Method, MethodInfo

WIDTH = 100


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show one method: its parameters, cost and paper.", show_default="all")
    ] = None,
    stage: Annotated[
        Literal["encoder", "connector", "decoder", "fusion"] | None,
        typer.Option(help="List the methods of one stage.", show_default="all"),
    ] = None,
    json: Json = False,
) -> None:
    """List the methods, or show the page of one."""
    from tokensieve.methods import list_methods
    from tokensieve.methods.registry import find

    if name is not None:
        if stage is not None:
            raise Refusal("--stage filters the list; it cannot be given with the name of a method")
        method = find(name)
        if json:
            print_json(_record(method.info))
        else:
            _print_page(method)
        return
    infos = [info for info in list_methods() if stage in (None, info.stage)]
    if json:
        print_json([_record(info) for info in infos])
        return
    rows = [(info.name, _plain(info.title), info.stage, info.paper.removeprefix("arXiv:")) for info in infos]
    print_table(("method", "what it does", "stage", "paper"), rows, left=4, width=WIDTH)
    typer.echo("'tokensieve methods NAME' shows the parameters, the cost and the paper of one method.")


def models(json: Json = False) -> None:
    """List the supported families of models."""
    from tokensieve.engine.fusion.families import FUSION_FAMILIES, FusionFamily
    from tokensieve.models import Family, families

    supported: list[Family | FusionFamily] = [*families(), *FUSION_FAMILIES]
    tested = tested_range("transformers")
    if json:
        keys = ("name", "title", "model_types", "stages", "modalities", "limits")
        print_json([{key: getattr(family, key) for key in keys} | {"transformers": tested} for family in supported])
        return
    titles = [f"{f.title}; videos, too" if "video" in f.modalities else f.title for f in supported]
    rows = [
        (f.name, title, ", ".join(f.model_types), ", ".join(f.stages), f.limits or "–")
        for f, title in zip(supported, titles, strict=True)
    ]
    print_table(("family", "models", "model types", "stages", "limits"), rows, left=5)
    print(f"Tested with transformers {tested}.")


def _record(info: MethodInfo) -> dict[str, Any]:
    return {**asdict(info), "needs": str(info.needs)}


def _print_page(method: type[Method]) -> None:
    """Print what the documentation's page of a method states, except results."""
    from tokensieve.commands.method_page import STAGES, Docstring, meaning_of, type_of

    docstring, info = Docstring.of(method), method.info
    typer.echo(info.name)
    for paragraph in docstring.text:
        typer.echo("\n" + fill(_plain(paragraph), WIDTH))
    link = info.paper.replace("arXiv:", "https://arxiv.org/abs/")
    facts = {
        "stage": f"{info.stage}, {STAGES[info.stage]}",
        "needs": str(info.needs),
        "cost": docstring.remarks.get("Cost", "not stated"),
        "paper": f"{docstring.remarks.get('Paper', '')} {link}".strip(),
        "official code": docstring.remarks.get("Official code", ""),
    }
    typer.echo()
    for label, fact in facts.items():
        if fact:
            typer.echo(fill(f"{label}: {_plain(fact)}", WIDTH, subsequent_indent="  "))
    typer.echo()
    hints = get_type_hints(method)
    rows = [
        (field.name, type_of(hints[field.name]), repr(field.default), _plain(meaning_of(field.name, docstring)))
        for field in fields(method)
    ]
    if rows:
        print_table(("parameter", "type", "default", "meaning"), rows, left=4, width=WIDTH)
    else:
        typer.echo("no parameters")


def _plain(text: str) -> str:
    """Return a text with the marks of a docstring simplified."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
