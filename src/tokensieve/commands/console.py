"""Output of the commands: results on stdout, progress on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import wraps
from typing import Any, ParamSpec, TypeAlias

import typer

from tokensieve.errors import Refusal

P = ParamSpec("P")
Update: TypeAlias = Callable[[int, int, str], None]
"""Called with (done, total, label)."""


def print_json(data: Any) -> None:
    """Print JSON on stdout. Characters beyond ASCII are escaped, unless the encoding has them all."""
    unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")  # a stream in memory has no encoding
    typer.echo(json.dumps(data, indent=2, ensure_ascii=not unicode))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, width: int = 160) -> None:
    """Print a table on stdout; the first ``left`` columns are text. Without a terminal it has ``width`` characters."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index < left else "right", overflow="fold", no_wrap=index >= left)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else width, markup=False).print(table)


def print_lines(lines: Sequence[str]) -> None:
    """Print paragraphs on stdout, wrapped between words at the width of :func:`print_table`."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    for line in lines:
        console.print(f"\n{line}")


@contextmanager
def progress() -> Iterator[Update]:
    """Show a bar on stderr, or print a line now and then where stderr is no terminal; yield its update."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines()
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)


class ProgressLines:
    """Prints a line at most every 30 seconds: for each further tenth, and at least every ten minutes."""

    SECONDS, LONGEST, SHARE = 30.0, 600.0, 0.1

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._line_time, self._line_done = clock, clock(), 0
        self._start: tuple[float, int] | None = None
        self._lines = 0

    def __call__(self, done: int, total: int, label: str) -> None:
        moment = self._clock()
        if self._start is None:  # answers of an earlier call do not show the rate
            self._start = moment, done
        waited, step = moment - self._line_time, (done - self._line_done) / total
        enough = step >= self.SHARE or not self._lines or waited >= self.LONGEST
        if waited < self.SECONDS or not enough or done >= total:
            return
        self._line_time, self._line_done, self._lines = moment, done, self._lines + 1
        rate = (done - self._start[1]) / (moment - self._start[0]) if moment > self._start[0] else 0
        pace = f", {rate:.3g} a second, {_duration((total - done) / rate)} left" if rate else ""
        note(f"{done:,} of {total:,} questions ({done / total:.0%}){pace}; {label}")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return "under a minute" if minutes < 1 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.0f} h"


def note(text: str) -> None:
    """Print one line on stderr."""
    typer.echo(text, err=True)


def in_all_processes(command: Callable[P, None]) -> Callable[P, None]:
    """Let several processes of a launcher run a command together. The first one prints, the others exit in silence."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from tokensieve.evaluate.processes import Processes

        processes = Processes.launched()
        with nullcontext() if processes.first else _silent(), processes.together():
            command(*args, **kwargs)

    return run


@contextmanager
def _silent() -> Iterator[None]:
    """Print nothing. A user's error becomes its exit code; the traceback of a bug is printed outside."""
    try:
        with open(os.devnull, "w", encoding="utf-8") as sink, redirect_stdout(sink), redirect_stderr(sink):
            yield
    except Refusal:
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
