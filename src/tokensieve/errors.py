"""Errors that a user can mend. Every other exception is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Refusal(ValueError):
    """Refuse what cannot be done. The message names the value, got and allowed; nothing has been changed.

    Raise it wherever the user's input is at fault, in plug-ins too. The command line prints it as one line (exit code
    2), and ``tokensieve check`` reports it as "refused". Any other exception is a bug and keeps its traceback.
    """


class DataError(Refusal):
    """The user's data cannot be used; the message names the file and the line."""


class ResumeError(Refusal):
    """The output folder holds the predictions of another set-up."""


class OutputError(Refusal, OSError):
    """A result cannot be written; the message says why, and what is kept."""


class MissingExtra(Refusal, ImportError):
    """An optional dependency is not installed.

    Args:
        need: the sentence before the command that installs it: "reading parquet needs pyarrow".
        extra: the extra of this project that holds it.
    """

    def __init__(self, need: str, extra: str) -> None:
        super().__init__(f'{need}: in the checkout, pip install -e ".[{extra}]"')


def nearest(name: str, known: Iterable[str]) -> str:
    """Return 'did you mean a, b?' or, when no name is near, the whole list. Capital letters make no distance."""
    known = sorted(known)
    by_lower = {entry.lower(): entry for entry in known}
    matches: list[str] = []
    for cutoff in (0.8, 0.5):  # a slip of a letter or two has one answer; farther names would only distract
        matches = matches or difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=cutoff)
    close = [by_lower[entry] for entry in matches]
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known) or 'none'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is no heading of a list, or its type if it has none."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return next((line for line in lines if not line.endswith(":")), lines[0])
