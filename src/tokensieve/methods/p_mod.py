"""p-MoD: routers let most visual tokens skip the deep layers of the LLM."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, ClassVar

from torch import Tensor

from tokensieve.errors import Refusal
from tokensieve.methods import register
from tokensieve.methods.skip import SkipMethod


@register("p-mod", paper="arXiv:2412.04449", stage="decoder", trained=True)
@dataclass(frozen=True)
class PMod(SkipMethod):
    """Let a trained router at each deep layer choose the visual tokens that the layer processes; the others skip it.

    The share of layer l of L is ρ = cos(l·π / (L − 1)) / 2 + ``shift``, at least 0.15; a layer with a share above 0.85
    processes all tokens, as layer 0 always does. The router maps a token's state to a score r, and the ⌊ρ·N⌋ largest
    take part. The factor a = 1 + 0.2·tanh(r) scales the MLP's output of a token that takes part, and the state of one
    that skips; through it the gradient reaches the router. No token leaves for good. ``tokensieve train p-mod`` trains
    the routers alone; the authors tune projector and LLM with them.

    A short training of the routers alone gains nothing on the bundled model (``average=0.6``, 311 steps): 75.2 % (73.2
    to 77.0) of 1,300 questions are answered right with 89 tokens on average over the layers, 78.2 with untrained
    routers, and 95.2 by ``random`` before the LLM with as many. No weights are shipped.

    Args:
        weights: "random" (all scores are equal, so that the first tokens take part), a folder of
            ``tokensieve train p-mod``, or the authors' checkpoint, of which the routers alone are read.
        shift: raises or lowers the share of all layers (the paper: 0.5).
        average: instead of ``shift``, the share of the tokens averaged over all layers: the largest shift within it is
            used. The paper's shift gives 0.54 in 32 layers.

    Cost: O(N·D) time for each layer that tokens skip, and one more copy of the hidden states, O(N·D) extra memory.
    Paper: "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay", ICCV 2025.
    Official code: the schedule is written for 32 layers; a share that rounds to no token gives none, here one; newline
    tokens between the rows of tiles have scores of their own, where here they follow the tokens of their row.
    """

    shift: float = 0.5
    average: float | None = None

    published = ".router.router."
    lowest: ClassVar[float] = 0.15
    plain: ClassVar[float] = 0.85

    def names_in(self, checkpoint: Iterable[str]) -> dict[str, str]:
        matches = {name: re.search(r"layers\.(\d+)\.router\.router\.(weight|bias)$", name) for name in checkpoint}
        return {name: ".".join(match.groups()) for name, match in matches.items() if match is not None}

    def sizes_of(self, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"first": min(int(name.partition(".")[0]) for name in parameters)}

    def factors(self, scores: Tensor) -> Tensor:
        return 1 + 0.2 * scores.tanh()

    def shares(self, depth: int) -> list[float]:
        """Return the share of the tokens that each of ``depth`` layers processes."""
        if self.average is None:
            return self._shares(depth, self.shift)
        low, high = -1.0, 2.0  # from the lowest share in every layer to all tokens in every layer
        for _ in range(40):  # bisection: the average grows with the shift, in steps where a layer becomes plain
            middle = (low + high) / 2
            low, high = (middle, high) if sum(self._shares(depth, middle)) <= self.average * depth else (low, middle)
        return self._shares(depth, low)

    def _shares(self, depth: int, shift: float) -> list[float]:
        curve = [cos(layer * pi / max(depth - 1, 1)) / 2 + shift for layer in range(depth)]
        return [1.0, *(1.0 if share > self.plain else max(share, self.lowest) for share in curve[1:])]

    def layer_numbers(self, depth: int) -> list[int]:
        layers = [layer for layer, share in enumerate(self.shares(depth)) if share < 1]
        if not layers:
            raise Refusal(
                f"{self}: no token skips a layer of this LLM of {depth}; lower shift or average, which are shares"
            )
        return layers

    def check_average(self, layers: Sequence[int], depth: int) -> None:
        lowest = sum(self._shares(depth, -1.0)) / depth
        if self.average is not None and not lowest <= self.average <= 1:
            raise Refusal(f"{self}: an average of {self.average:.4g} is out of reach; reachable: {lowest:.4g} to 1")

    def stage_budgets(self, total: int, layers: Sequence[int], depth: int) -> list[int]:
        shares = self.shares(depth)
        return [max(1, int(total * shares[layer])) for layer in layers]
