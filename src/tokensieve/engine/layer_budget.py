"""Budgets as an average over the layers of the LLM, for one stage or for a connector stage and one inside the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokensieve.budget import Number, count, rule_of
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, Method
from tokensieve.methods.registers import RegisterMethod
from tokensieve.methods.skip import SkipMethod

MANY = 1 << 16  # tokens of an image in the check of a share: large enough that rounding does not matter


@dataclass(frozen=True)
class LayerBudget:
    """The numbers by which the tokens of an image, averaged over all layers of the LLM, are what ``keep`` asks for.

    Two stages have two unknowns. The stage inside the LLM keeps its published share (the default of its ``keep``) of
    what enters, and the number that enters is solved for by bisection. Where all tokens may enter, and to make up for
    rounding, its own budget is then solved for, too. A stage whose ``keep`` is a number keeps it.

    Attributes:
        wanted: the average, in tokens or as a share of the image's tokens.
        connector, decoder: the two stages; the decoder has its published budget if it is solved for.
        layers: the layers before which tokens leave; ``depth``: the layers of the LLM.
        solves_connector, solves_decoder: the stages whose budget is open.
    """

    wanted: Number
    connector: Method | None
    decoder: DecoderMethod | None
    layers: Sequence[int]
    depth: int
    solves_connector: bool
    solves_decoder: bool

    @classmethod
    def of(cls, methods: Sequence[Method], depth: int) -> LayerBudget | None:
        """Return the budgets of these stages; ``None`` if none asks for an average over the layers.

        Raises:
            Refusal: a stage inside the LLM without a budget that can be solved for, or an average out of reach.
        """
        by_stage = {method.info.stage: method for method in methods}
        connector, decoder = by_stage.get("connector"), by_stage.get("decoder")
        rules = [rule_of(method.budget) if method is not None else None for method in (connector, decoder)]
        solves = [rule is not None and rule.mean == "layers" for rule in rules]
        rule = next((rule for rule, solved in zip(rules, solves, strict=True) if solved), None)
        if rule is None:
            return None
        layers: list[int] = []
        if isinstance(decoder, DecoderMethod):
            layers = decoder.layer_numbers(depth)
            if solves[1]:
                decoder = _published(decoder, str(rule))
            if decoder.stage_budgets(MANY, layers, depth) is None:
                raise Refusal(f"keep={str(rule)!r} must know how many tokens leave; {decoder} decides by the content")
        solves_decoder = solves[1] and getattr(decoder, "counts", None) is None
        budget = cls(rule.wanted, connector, decoder, layers, depth, solves[0], solves_decoder)  # type: ignore[arg-type]
        budget.check()
        return budget

    def check(self) -> None:
        """Refuse, before there is an image, an average that no image can reach."""
        keep = None if self.connector is None or self.solves_connector else self.connector.budget
        if isinstance(self.wanted, int):
            if isinstance(keep, int) and self.wanted > keep:
                self._refuse(f"{self.wanted} tokens", f"{keep} tokens enter")
            return
        if isinstance(keep, int):
            return  # depends on the size of the image
        entering = self.entering(MANY, MANY) if keep is None else count(keep, MANY)
        if self.decoder is not None:
            try:
                self.inside(MANY, entering).stage_budgets(entering, self.layers, self.depth)
            except Refusal:
                first = f"all tokens that enter pass the first {self.layers[0]} of {self.depth} layers"
                self._refuse(f"{self.wanted:.4g} of the tokens", first)

    def target(self, total: int) -> float:
        """Return the wanted average for an image of ``total`` tokens."""
        return max(1.0, min(total, self.wanted if isinstance(self.wanted, int) else self.wanted * total))

    def mean(self, entering: int) -> float:
        """Return the average over the layers if so many tokens enter and the decoder has its published budget."""
        if self.decoder is None:
            return entering
        if isinstance(self.decoder, SkipMethod):  # tokens return behind each of its layers
            return sum(self.decoder.tokens_of_layers(entering, self.layers, self.depth)) / self.depth
        inside = self.decoder.stage_budgets(entering, self.layers, self.depth) or []
        spans = [end - start for start, end in zip(self.layers, [*self.layers[1:], self.depth], strict=True)]
        registers = self.decoder.registers(entering) if isinstance(self.decoder, RegisterMethod) else 0
        return (
            self.layers[0] * (entering + registers) + sum(n * span for n, span in zip(inside, spans, strict=True))
        ) / self.depth

    def entering(self, total: int, received: int) -> int:
        """Return the number of tokens that the connector stage keeps.

        Args:
            total: tokens of the image; ``received``: those that the vision encoder left.
        """
        if not self.solves_connector:
            return received
        target = self.target(total)
        low, high = 1, received
        while low < high:  # the largest number whose average is at most the target: the average grows with it
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.mean(middle) <= target else (low, middle - 1)
        # without a second open budget, the average cannot grow further once all tokens enter
        if low == received and not self.solves_decoder and self.mean(low) < target - 1 and received == total > target:
            self._refuse(f"{target:.4g} of {total} tokens", f"at most {self.mean(low):.4g}")
        return low

    def inside(self, total: int, entered: int) -> DecoderMethod:
        """Return the decoder method with its budget for an image of which ``entered`` tokens entered the LLM."""
        assert self.decoder is not None
        if not self.solves_decoder:
            return self.decoder
        target = self.target(total)
        if target > entered + 0.5 and entered < total and not self.solves_connector:
            self._refuse(f"{target:.4g} of {total} tokens", f"{entered} enter")
        average: dict[str, Any] = {"average": min(1.0, target / entered)}
        return replace(self.decoder, **average)

    def _refuse(self, average: str, reason: str) -> None:
        stages = " + ".join(str(method) for method in (self.connector, self.decoder) if method is not None)
        raise Refusal(f"an average of {average} over the layers is out of reach of {stages}: {reason}")


def _published(decoder: DecoderMethod, rule: str) -> DecoderMethod:
    """Return a decoder method with its published budget in the place of the rule."""
    parameters = decoder.info.parameters
    if "average" not in parameters:
        raise Refusal(f"{decoder.info.name} has no parameter 'average': give it a number, as in keep=0.5")
    if getattr(decoder, "average", None) is not None:
        raise Refusal(f"{decoder.info.name} has both keep={rule!r} and an average: leave one of them out")
    return decoder.with_budget(parameters["keep"])
