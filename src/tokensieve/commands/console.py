"""Output of the commands: results on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer


def print_json(data: Any) -> None:
    """Print JSON on stdout."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, width: int = 160) -> None:
    """Print a table on stdout; the first ``left`` columns are text. Without a terminal it has ``width`` characters."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index < left else "right", overflow="fold", no_wrap=index >= left)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else width, markup=False).print(table)


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on stderr; yield the function (done, total, label) that updates it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)


def note(text: str) -> None:
    """Print one line on stderr."""
    typer.echo(text, err=True)
