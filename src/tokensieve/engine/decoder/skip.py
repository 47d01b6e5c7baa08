"""Layers of the LLM that some tokens skip: the layer runs on a shorter sequence, and behind it all tokens stand again.

Before the layer, tokens leave as they do for good (``DecoderHooks``). Behind it, ``Skip`` writes the layer's outputs
into the sequence that entered, and the state of the prefill becomes what it was before the layer. The bookkeeping of
each layer's cache is its own, so decode steps need nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tokensieve.engine.decoder.sequence import PrefillState
from tokensieve.engine.inflight import InFlight
from tokensieve.engine.prompt.placeholders import ColumnSelection
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderNeeds
from tokensieve.methods.skip import SkipMethod
from tokensieve.models.versions import checkpoints_activations


@dataclass(frozen=True, eq=False)
class Skip:
    """A layer that tokens skip, while it runs.

    Attributes:
        entering: `[B, n, D]`, all rows before the layer.
        factors: `[B, n]` float32, of all columns; 1 on text.
        taking_part: the columns that the layer processes; ``None``: all.
        scales: what the factors multiply, as in :class:`~tokensieve.methods.skip.SkipMethod`.
    """

    entering: Tensor
    factors: Tensor
    taking_part: ColumnSelection | None
    scales: Literal["mlp", "layer"]

    def scale(self, rows: Tensor) -> Tensor:
        """Return the rows `[B, m, D]` of the columns that take part, times their factors."""
        factors = self.factors if self.taking_part is None else self.taking_part.take(self.factors)
        return rows * factors[..., None].to(rows.dtype)

    def rejoin(self, output: Tensor) -> Tensor:
        """Return all rows behind the layer, `[B, n, D]`; ``output`` `[B, m, D]` is the layer's."""
        passing, columns = self.entering, self.taking_part
        if self.scales == "layer":
            before = passing if columns is None else columns.take_rows(passing)
            output = before + self.scale(output - before)
        else:  # the MLP's output is scaled already
            passing = passing * self.factors[..., None].to(passing.dtype)
        if columns is None:
            return output
        # padding is written into one more column, which is then cut off
        place = columns.index.where(columns.valid, passing.shape[1])[..., None].expand_as(output)
        return pad(passing, (0, 0, 0, 1)).scatter(1, place, output)[:, :-1]


class SkipHooks:
    """Hooks inside and behind the layers that tokens skip.

    Args:
        decoder: the LLM.
        numbers: the layers that tokens skip.
        repair: the repair of attention that is attached with the method.

    Raises:
        Refusal: for evidence that is read between layers, with repaired attention, or in an LLM without MLPs.
    """

    def __init__(
        self, decoder: Any, method: SkipMethod, numbers: Sequence[int], flight: InFlight, repair: str | None
    ) -> None:
        if method.needs != DecoderNeeds():
            raise Refusal(f"tokens of {method} skip layers, so it can read their hidden states and nothing more")
        if repair is not None:
            raise Refusal(f"repair={repair!r} counts tokens that left, and those of {method} return behind each layer")
        layers = [decoder.layers[number] for number in numbers]
        if not all(hasattr(layer, "mlp") for layer in layers):
            raise Refusal(f"{method} scales the output of each layer's MLP; layers of this LLM have none of that name")
        self.decoder, self.method, self.flight = decoder, method, flight
        # first: hooks that collect outputs of layers then get all tokens
        self._handles = [layer.register_forward_hook(self._behind_layer, prepend=True) for layer in layers]
        if method.scales == "mlp":
            # where a norm follows the MLP, it would undo the factor
            last = [getattr(layer, "post_feedforward_layernorm", layer.mlp) for layer in layers]
            self._handles += [part.register_forward_hook(self._behind_mlp) for part in last]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def check(self) -> None:
        """Refuse a forward in which layers run twice."""
        if self.decoder.training and checkpoints_activations(self.decoder):
            raise Refusal(f"gradient checkpointing runs layers again, which tokens of {self.method} skip: turn it off")

    def start(self, state: PrefillState, entering: Tensor) -> None:
        """Start a layer that runs on ``state.sequence``; ``entering`` `[B, n, D]` are all rows before it."""
        factors = torch.ones(entering.shape[:2], device=entering.device)
        for row, number in state.members:
            image = state.images[row][number]
            scores = image.inside[-1].scores
            if scores is None:  # the image takes part whole, as in the unmodified layer
                continue
            of_tokens, separator = self.method.factors(scores), replace(image, inside=()).remaining.separator
            if separator is not None:
                of_tokens = of_tokens.masked_fill(separator, 1.0)
            factors[row, state.entry.images[row][number]] = of_tokens
        taking_part = None if state.untouched else state.sequence.columns
        self.flight.skip = Skip(entering, factors, taking_part, self.method.scales)

    def _behind_mlp(self, module: nn.Module, args: Any, output: Any) -> Any:
        skip: Skip | None = self.flight.skip
        return None if skip is None else skip.scale(output)

    def _behind_layer(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """Return the output of a layer for all tokens, and end the shorter sequence."""
        skip, state = self.flight.skip, self.flight.decoding
        if skip is None:
            return None
        assert isinstance(state, PrefillState)
        self.flight.skip = None
        state.restore()
        if isinstance(output, tuple):
            return (skip.rejoin(output[0]), *output[1:])
        return skip.rejoin(output)
