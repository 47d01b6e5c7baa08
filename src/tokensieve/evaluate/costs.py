"""Costs of all rows of a comparison, measured in one session and kept in the journal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tokensieve.errors import Refusal
from tokensieve.evaluate.answer import is_out_of_memory
from tokensieve.evaluate.journal import Journal
from tokensieve.evaluate.plan import Entry
from tokensieve.evaluate.provenance import sample_key
from tokensieve.evaluate.rows import BLIND
from tokensieve.evaluate.runner import Runner
from tokensieve.measure import Cost, measure_costs

if TYPE_CHECKING:
    from tokensieve.evaluate.compare import Comparison


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


def row_costs(
    comparison: Comparison,
    entries: Sequence[Entry],
    runners: Sequence[Runner],
    journal: Journal,
    machine: dict[str, Any],
) -> list[Cost]:
    """Return the cost of every row but the blind one, from one session of rounds that all rows share.

    The first sample is measured. Rows of the fine-tuned model are paired with the compared model, too.

    Raises:
        Refusal: memory ran out; the answers are kept.
    """
    sample, entries = comparison.samples[0], [entry for entry in entries if entry.method != BLIND]
    others = entries[1:]

    def measure() -> list[Cost]:
        return measure_costs(
            comparison.model,
            runners[0].answerer.inputs([sample]),
            [runners[entry.trained].candidate(entry, sample) for entry in others],
            models=[runners[entry.trained].answerer.model for entry in others],
            processor=comparison.text_processor,
            **comparison.settings.attach_options(),
        )

    keys = [entry.runs[0].key for entry in entries]
    try:
        return session_costs(journal, {**machine, "sample": sample_key(sample)}, keys, measure)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise Refusal(
            "memory ran out while the costs of one prompt were measured; the answers are kept, and the same "
            "comparison without measuring (--no-measure, measure=False) gives their results"
        ) from error
