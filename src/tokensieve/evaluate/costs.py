"""Costs of the rows, measured once per machine and kept in the journal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tokensieve.budget import BudgetScope
from tokensieve.evaluate.journal import Journal
from tokensieve.evaluate.results import FULL
from tokensieve.measure import Bench, Cost
from tokensieve.measure.costs import Candidate


class Costs:
    """Measures on one prompt, or reads a cost that this machine has measured before from the journal.

    Args:
        model, processor, scope: as for :func:`tokensieve.measure.measure_costs`.
        inputs: makes the tensors of the prompt; called before the first measurement only.
        journal: stores the costs.
        machine: the environment. Costs are reused under an equal one, whatever its date.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        inputs: Callable[[], Mapping[str, Tensor]],
        journal: Journal,
        machine: Mapping[str, Any],
        scope: BudgetScope = "image",
    ) -> None:
        self._model, self._processor, self._scope = model, processor, scope
        self._inputs, self._journal = inputs, journal
        text = json.dumps({**machine, "date": ""}, sort_keys=True)
        self._machine_digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        self._bench: Bench | None = None

    def of(self, run: str, method: Candidate) -> Cost:
        """Return the cost of a run; the run "full" is the unhooked model."""
        name = f"{run} @{self._machine_digest}"
        if name not in self._journal.costs:
            if self._bench is None:
                self._bench = Bench(self._model, self._inputs(), processor=self._processor, budget_scope=self._scope)
            cost = self._bench.full if run == FULL else self._bench.cost(method)
            self._journal.add_cost(name, cost.to_json())
        return Cost.from_json(self._journal.costs[name])
