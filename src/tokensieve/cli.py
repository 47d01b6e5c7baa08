"""The ``tokensieve`` command. Each subcommand is a file in ``tokensieve.commands`` that imports torch when it runs."""

from __future__ import annotations

import io
import logging
import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tokensieve.commands import (
    ask,
    batch,
    bench,
    calibrate,
    catalogue,
    check,
    compare,
    convert,
    demo,
    harness,
    new_method,
    reproduce,
    serve,
    train,
    tune,
)
from tokensieve.errors import Refusal
from tokensieve.version import TESTED, __version__, tested_range

QUIET = ("accelerate", "bitsandbytes", "peft")  # libraries that log warnings in every call
RESUMABLE = ("batch", "compare", "reproduce", "train", "tune")


class Cli(TyperGroup):
    """Turns a user's error into one line and exit code 2, Ctrl-C into 130. A bug keeps its traceback (exit code 1)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            hint = "; resume with the same command" if ctx.invoked_subcommand in RESUMABLE else ""
            typer.echo(f"tokensieve: interrupted{hint}", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            line = users_error(error)
            if line is None:
                raise
            typer.echo(f"tokensieve: {line}", err=True)
            raise typer.Exit(2) from None


def users_error(error: Exception) -> str | None:
    """Return one line for an error that the user can fix, ``None`` for a bug.

    Only the type decides: a ``Refusal``, an error of the system (``OSError``), or typer's error about an option.
    """
    if isinstance(error, BrokenPipeError):
        return None
    if hasattr(error, "format_message"):  # of typer: an unknown option, a missing argument
        # newer typer passes on the words that pydantic puts before a reason
        text = str(error.format_message()).replace(": Value error, ", ": ")
    elif isinstance(error, Refusal):
        text = str(error)
    elif isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    else:
        return None
    return " ".join(text.split()) or None


app = typer.Typer(
    name="tokensieve",
    cls=Cli,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def print_versions(requested: bool) -> None:
    """Print the versions that a report of a problem needs, and end."""
    if not requested:
        return
    typer.echo(f"tokensieve {__version__}")
    typer.echo(f"python {platform.python_version()}")
    for library in TESTED:
        try:
            installed = version(library)
        except PackageNotFoundError:
            installed = "is not installed"
        typer.echo(f"{library} {installed} (tested: {tested_range(library)})")
    raise typer.Exit


@app.callback()
def options(
    versions: Annotated[
        bool,
        typer.Option("--version", callback=print_versions, is_eager=True, help="Print the versions, and end."),
    ] = False,
) -> None:
    """Drop visual tokens from vision-language models: see what it saves and what it costs."""


app.command("methods")(catalogue.methods)
app.command("models")(catalogue.models)
app.command("ask")(ask.ask)
app.command("compare")(compare.compare)
app.command("reproduce")(reproduce.reproduce)
app.command("batch")(batch.batch)
app.command("bench")(bench.bench)
app.command("check")(check.check)
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.command("tune")(tune.tune)
app.command("new-method")(new_method.new_method)
app.add_typer(calibrate.app, name="calibrate")
app.add_typer(convert.app, name="convert")
app.add_typer(harness.app, name="harness")
app.add_typer(train.app, name="train")


def main() -> None:
    """Run the command line. Warnings of Tokensieve are one line each; warnings of other libraries are silenced."""
    _open_streams()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="tokensieve")
        warnings.showwarning = lambda message, *_: typer.echo(f"note: {message}", err=True)
        for library in QUIET:
            logging.getLogger(library).setLevel(logging.ERROR)
    app()


def _open_streams() -> None:
    """Print to nowhere where a stream is closed, and "?" for a character that its encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open until the end)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
