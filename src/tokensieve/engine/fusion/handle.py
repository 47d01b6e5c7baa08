"""The handle of a fusion method that is attached to a cross-modal encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokensieve.engine.fusion.families import host_of
from tokensieve.engine.fusion.passes import FusionPass
from tokensieve.engine.handle import Sieve
from tokensieve.engine.handoff import Decisions
from tokensieve.errors import Refusal
from tokensieve.methods import FusionMethod, Method, Positions
from tokensieve.methods.fusion import KeepEverything


class FusionSieve(Sieve):
    """A fusion method, attached. ``last`` is `[sample][image]`, the reduction of image tokens in the latest call.

    Image tokens are counted as the encoder receives them: its [CLS] first, then the patches.
    """

    def __init__(self, model: Any, methods: Sequence[Method], positions: Positions) -> None:
        super().__init__(model, methods)
        if positions != "original":
            raise Refusal("a cross-modal encoder has no positions to renumber; leave positions='original'")
        (method,) = methods
        self._passes: list[FusionPass] = []
        # the only other method that comes here keeps everything: its tokens are counted all the same
        acting = method if isinstance(method, FusionMethod) else KeepEverything()
        self._host = host_of(model)(model, acting, self._record)

    def _compose(self) -> Decisions:
        return [list(row) for row in zip(*(one_pass.decisions() for one_pass in self._passes), strict=True)]

    def _record(self, passes: list[FusionPass]) -> None:
        self._passes, self._decisions = passes, None
        depth = self._host.depth(self.model)
        by_image = [one_pass.tokens(depth) for one_pass in passes]
        self.tokens = [list(row) for row in zip(*by_image, strict=True)]

    def _remove(self) -> None:
        self._host.remove()
