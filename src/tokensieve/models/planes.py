"""The rows of an encode call's output that the forward of a model puts in place of the placeholders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def rows_of(output: Any) -> Any:
    """Return the rows of all images: one tensor, or one per image.

    They are the ``pooler_output`` of most models. A model that adds rows to several layers of its LLM may have no
    others: the first level is returned (Granite 4 Vision). A model without both projects ``last_hidden_state`` in its
    forward (Llama 4).
    """
    if output.pooler_output is not None:
        return output.pooler_output
    levels = getattr(output, "deepstack_features", None)
    return output.last_hidden_state if levels is None else _level(levels[0])


def replace_rows(output: Any, rows: Any, in_level: Callable[[Any], Any]) -> None:
    """Replace the rows of all images in place, and those of each level for the LLM's layers by ``in_level`` of them."""
    levels = getattr(output, "deepstack_features", None)
    if output.pooler_output is not None:
        output.pooler_output = rows
    elif levels is None:
        output.last_hidden_state = rows
    if levels is not None:
        output.deepstack_features = [
            (level[0], in_level(level[1])) if _numbered(level) else in_level(level) for level in levels
        ]


def _level(level: Any) -> Any:
    return level[1] if _numbered(level) else level


def _numbered(level: Any) -> bool:
    """Return whether a level is a pair: the number of an LLM layer, and its rows."""
    return isinstance(level, tuple) and isinstance(level[0], int)
