"""``tokensieve new-method``: write a working method and its test, to start from."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import typer

from tokensieve.errors import Refusal

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def new_method(
    name: Annotated[str, typer.Argument(help="Small letters, digits and hyphens: 'loud-words'.", show_default=False)],
    stage: Annotated[
        Literal["connector", "decoder"], typer.Option(help="Act between encoder and LLM, or inside the LLM.")
    ] = "connector",
    trained: Annotated[
        bool, typer.Option("--trained", help="Decide by a small net, for `tokensieve train`; before the LLM.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the two files, created if it is missing.")] = Path(),
) -> None:
    """Write a working method in one file, and its test. No other file needs an edit."""
    from tokensieve.methods import list_methods
    from tokensieve.methods.spec import NAME as IN_A_SPEC

    if not NAME.fullmatch(name):
        raise Refusal(f"a method's name is made of small letters, digits and hyphens, as in 'loud-words'; got {name!r}")
    if name in [info.name for info in list_methods()]:
        raise Refusal(f"the method name {name!r} is taken; 'tokensieve methods' lists them all")
    title, module = "".join(part.capitalize() for part in name.split("-")), name.replace("-", "_")
    if module in sys.stdlib_module_names:
        raise Refusal(f"a file {module}.py would hide Python's own module; choose another name than {name!r}")
    method, test = output / f"{module}.py", output / f"test_{module}.py"
    if not IN_A_SPEC.fullmatch(str(method)):
        raise Refusal(f"a method spec cannot name {str(method)!r}: use letters, digits and ./\\:~_- in the folder")
    if trained and stage != "connector":
        raise Refusal(f"the written net decides before the LLM: leave out --stage, or --trained; got {stage!r}")
    texts = {method: _template("trained" if trained else stage), test: _template("test_my_method")}
    if re.search(rf"import .*\b{title}\b", texts[method]):
        raise Refusal(f"a class {title} would hide the one it needs; choose another name than {name!r}")
    for path in texts:
        if path.exists():
            raise Refusal(f"{path} exists already; choose another name or folder")
    output.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        for placeholder, value in (("my-method", name), ("my_method", module), ("MyMethod", title)):
            text = text.replace(placeholder, value)
        path.write_text(text, "utf-8")
    typer.echo(f"Wrote {method}, a complete method, and {test}, its test. Nothing has run yet. Next:\n")
    typer.echo(f"  tokensieve check reference --method {method}:{title}")
    typer.echo(f'  tokensieve compare --methods "{method}:{title}, random" --keep 25% --limit 200')
    if trained:
        typer.echo(f"  tokensieve train {method}:{title} --output runs/{name}")
    typer.echo(f"  python -m pip install pytest && python -m pytest {test}")


def _template(name: str) -> str:
    return files("tokensieve.commands.templates").joinpath(f"{name}.py").read_text("utf-8")
