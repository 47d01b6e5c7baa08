"""Costs of all rows of a comparison, measured in one session and kept in the journal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from tokensieve.evaluate.journal import Journal
from tokensieve.measure import Cost


def session_costs(
    journal: Journal, setting: dict[str, Any], rows: Sequence[str], measure: Callable[[], Sequence[Cost]]
) -> list[Cost]:
    """Return one cost per row, all from one session: the latest recorded one that holds all rows, or a new one.

    Rows of two sessions are never mixed: each session has times of the full model of its own.

    Args:
        journal: keeps a session as one line, so that an interrupted one leaves nothing.
        setting: the machine and the prompt; a session is used again under an equal one only, whatever its date.
        rows: key of each row.
        measure: measures the rows, in this order.
    """
    text = json.dumps({**setting, "date": ""}, sort_keys=True)
    prefix = f"costs @{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    for name, session in reversed(journal.costs.items()):
        if name.startswith(prefix) and set(rows) <= session.keys():
            return [Cost.from_json(session[row]) for row in rows]
    costs = list(measure())
    session = {row: cost.to_json() for row, cost in zip(rows, costs, strict=True)}
    journal.add_cost(f"{prefix} {hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8]}", session)
    return costs
