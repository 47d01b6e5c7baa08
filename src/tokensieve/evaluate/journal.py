"""The predictions so far, appended line by line, so that an interrupted comparison continues where it was."""

from __future__ import annotations


class OutputError(OSError):
    """A result cannot be written: one line that says why and what is kept."""


class ResumeError(ValueError):
    """The output folder holds the predictions of another set-up."""
