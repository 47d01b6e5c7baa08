"""Append-only files of JSON lines, from which a long run continues. Their first line holds the run's set-up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokensieve.errors import OutputError


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append one line per row.

    Raises:
        OutputError: the file cannot be written.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        with path.open("ab") as file:
            file.write(text.encode())
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; what was written before is kept, "
            "and the same call continues from there"
        ) from error


def complete_lines(path: Path) -> list[bytes]:
    """Return the complete lines. An incomplete last line, left by a crash or a full disk, is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    # only a file with a set-up is ever shortened: a foreign file is refused later, unchanged
    if len(whole) < len(data) and (not whole or whole.startswith(b'{"setup"')):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.splitlines()
