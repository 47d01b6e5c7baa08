"""What each row costs, measured once per machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tokensieve.budget import Scope
from tokensieve.evaluate.journal import Journal
from tokensieve.measure import Bench, Cost
from tokensieve.measure.costs import Candidate


class Costs:
    """Measures on one prompt, or reads from the journal what this machine measured before.

    Args:
        model, processor, scope: as for :func:`tokensieve.measure.measure_costs`.
        inputs: makes the prompt's tensors, once they are needed.
        journal: where costs are kept.
        place: the environment; the date does not matter.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        inputs: Callable[[], Mapping[str, Tensor]],
        journal: Journal,
        place: Any,
        scope: Scope = "image",
    ) -> None:
        self._model, self._processor, self._scope = model, processor, scope
        self._inputs, self._journal = inputs, journal
        where = json.dumps({**place, "date": ""}, sort_keys=True)
        self._mark = hashlib.sha256(where.encode()).hexdigest()[:8]
        self._bench: Bench | None = None

    def of(self, run: str, method: Candidate) -> Cost:
        """The cost of a run; "full" is the unhooked model."""
        name = f"{run} @{self._mark}"
        if name not in self._journal.costs:
            if self._bench is None:
                self._bench = Bench(self._model, self._inputs(), processor=self._processor, budget_scope=self._scope)
            cost = self._bench.full if run == "full" else self._bench.cost(method)
            self._journal.add_cost(name, cost.to_json())
        return Cost.from_json(self._journal.costs[name])
