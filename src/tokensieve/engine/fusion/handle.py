"""The sieve of a cross-modal encoder: hooks and refusals live in ``tokensieve.fusion``, the handle is common."""

from __future__ import annotations

from typing import Any

from tokensieve.engine.connector.decide import Scope
from tokensieve.engine.connector.prefill import Decisions
from tokensieve.engine.fusion.families import host_of
from tokensieve.engine.fusion.passes import FusionPass
from tokensieve.engine.sieve import Sieve
from tokensieve.errors import Refusal
from tokensieve.methods import FusionMethod, Method, Positions
from tokensieve.methods.pumer import PuMer


class FusionSieve(Sieve):
    """A fusion method, attached. ``last`` is `[sample][image]` of the latest call: what became of its image tokens.

    Image tokens are counted as the encoder sees them: its [CLS] first, then the patches.
    """

    def __init__(
        self,
        model: Any,
        stages: list[Method],
        replay: Decisions | None,
        positions: Positions,
        processor: Any,
        scope: Scope = "image",
    ) -> None:
        (method,) = stages
        if method.info.name == "full":
            method = PuMer(layers=())
        if not isinstance(method, FusionMethod):
            raise Refusal(f"{method.info.name} must be a FusionMethod to act at the fusion stage")
        if positions != "original":
            raise Refusal("a cross-modal encoder has no positions to renumber; leave positions='original'")
        self.model, self.stages, self.positions = model, stages, positions
        self._passes: list[FusionPass] = []
        self._decisions: Decisions | None = None
        self.tokens = []
        self._host = host_of(model)(model, method, self._ended)
        self._depth = self._host.depth(model)

    @property
    def last(self) -> Decisions:
        """`[sample][image]`, worked out when it is asked for: reading it costs, calling the model does not."""
        if self._decisions is None:
            self._decisions = [list(row) for row in zip(*(p.decisions() for p in self._passes), strict=True)]
        return self._decisions

    def _ended(self, passes: list[FusionPass]) -> None:
        self._passes, self._decisions = passes, None
        by_image = [p.tokens(self._depth) for p in passes]
        self.tokens = [list(row) for row in zip(*by_image, strict=True)]

    def _remove(self) -> None:
        self._host.remove()
