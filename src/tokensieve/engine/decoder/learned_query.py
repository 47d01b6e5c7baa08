"""A learned query that runs beside the prompt, as if it stood behind the prompt's last token.

No token of the prompt would attend to it there, so the prompt runs without it. The query's row goes through each layer
after the prompt has: it attends to the keys and values that the layer has just computed, and to itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from tokensieve.engine.decoder.masks import CREATE_MASK
from tokensieve.engine.decoder.sequence import PrefillState
from tokensieve.engine.inflight import InFlight
from tokensieve.engine.probe import Probe
from tokensieve.errors import Refusal

Rope = tuple[Tensor, Tensor]


class QueryNet(Protocol):
    """A net with a learned query."""

    def added(self, layer: int, eps: float) -> Tensor:
        """Return the row `[1, D]` that is added to the query before a layer."""


@dataclass(eq=False)
class QueryRow:
    """A learned query on its way through the layers.

    Attributes:
        positions: its position ids for the rotary embedding, `[B or 1, 1]` or `[axes, B, 1]`.
        row: `[B, 1, D]`; ``None`` before the first layer.
        rope: (cos, sin) by kind of attention.
    """

    positions: Tensor
    row: Tensor | None = None
    rope: dict[str, Rope] = field(default_factory=dict)


class KeysBeside(Cache):  # type: ignore[misc]  # transformers is untyped
    """The keys and values of one layer as a cache: rows attend to them, and nothing is stored."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        super().__init__(layers=[layer])

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *ignored: Any, **unused: Any) -> Any:
        (layer,) = self.layers
        return torch.cat([layer.keys, keys], -2), torch.cat([layer.values, values], -2)


class GraphProbe(Probe):
    """Reads queries, keys and values with their gradients."""

    def observe(self, query: Tensor, key: Tensor, scaling: float | None, mask: Tensor | None, value: Tensor) -> None:
        if self.armed:
            self.flight.readings[self].append((query, key, value, scaling or query.shape[-1] ** -0.5))


class LearnedQuery:
    """Runs the learned query of a net through the first layers of an LLM, and reads its attention in the last of them.

    Args:
        decoder: the LLM.
        count: the number of these layers.
        kinds: the kind of attention of each layer.
        read: "logits" of the attention, or the "log" of probabilities.
        net: the net.

    Raises:
        Refusal: if a layer has no attention, or the LLM no rotary embedding.
    """

    def __init__(
        self,
        decoder: Any,
        count: int,
        kinds: Sequence[str],
        read: Literal["logits", "log"],
        flight: InFlight,
        net: Any,
    ) -> None:
        self.decoder, self.kinds, self.read, self.flight, self.net = decoder, kinds, read, flight, net
        layers = list(decoder.layers)[:count]
        if not all(hasattr(layer, "self_attn") for layer in layers) or not hasattr(decoder, "rotary_emb"):
            raise Refusal("a learned query needs attention in every layer that it runs through, and rotary embeddings")
        self.probes = [GraphProbe(layer.self_attn, _nothing, flight) for layer in layers]
        self._handles = [
            layer.register_forward_hook(partial(self._after_layer, number), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]
        self._handles.append(decoder.rotary_emb.register_forward_pre_hook(self._before_rotary, with_kwargs=True))

    def remove(self) -> None:
        for part in (*self.probes, *self._handles):
            part.remove()

    def arm(self) -> None:
        """Read from now on, until the forward ends."""
        for probe in self.probes:
            probe.arm()

    def _before_rotary(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Take the prompt's position ids, of whatever axes, where the LLM itself uses them first."""
        state = self.flight.decoding
        if isinstance(state, PrefillState) and state.query is None and self.probes[0].armed:
            ids = args[1] if len(args) > 1 else kwargs["position_ids"]
            state.query = QueryRow(ids[..., -1:] + 1)  # text has the same id on all axes

    def _after_layer(self, number: int, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Run the query through a layer that the prompt has passed."""
        state, probe = self.flight.decoding, self.probes[number]
        readings = probe.take()
        if not isinstance(state, PrefillState) or not readings or state.query is None:
            return
        if self.flight.repair is not None:
            raise Refusal("a learned query attends without the bias of repaired attention: attach without repair")
        ((_, keys, values, _),) = readings
        hidden = output[0] if isinstance(output, tuple) else output
        query, kind = state.query, self.kinds[number]
        added = self.net.to(hidden.device).added(number, norm_eps(self.decoder)).to(hidden)
        row = added.expand(len(hidden), 1, -1) if query.row is None else query.row.to(hidden) + added
        if kind not in query.rope:
            query.rope[kind] = rotary(self.decoder, kind, row, query.positions)
        last = number == len(self.probes) - 1
        if last:
            probe.arm()
        query.row = pass_beside(
            self.decoder, number, kind, row, (keys, values), state.sequence.mask, query.rope[kind], kwargs
        )
        if last:
            ((rows, keys, _, scaling),) = probe.take()
            state.evidence["query_attention"] = self._attention(rows, keys, scaling, state.sequence.mask)
            state.query = None

    def _attention(self, query: Tensor, keys: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
        """Return the attention of the query `[B, H, 1, d]` to the prompt, `[B, H, n]`; the last key is its own."""
        batch, heads, _, width = keys.shape
        grouped = query.float().reshape(batch, heads, -1, width)  # queries that share a key
        logits: Tensor = (grouped @ keys.float().transpose(-1, -2) * scaling).flatten(1, 2)
        if self.read == "log":
            if mask is not None:
                logits = logits.masked_fill(pad(mask, (0, 1), value=1)[:, None] == 0, -torch.inf)
            logits = logits.log_softmax(-1)
        return logits[..., :-1]


def pass_beside(
    decoder: Any,
    number: int,
    kind: str,
    rows: Tensor,
    cached: tuple[Tensor, Tensor],
    mask: Tensor | None,
    rope: Rope,
    kwargs: dict[str, Any],
) -> Tensor:
    """Run rows `[B, R, D]` through one layer, behind a prompt that has passed it, and return its output for them.

    Args:
        cached: keys and values `[B, heads, n, d]` of the prompt in this layer.
        mask: `[B, n]`, 0 on padding; ``None`` if there is none.
        rope: (cos, sin) `[B, R, d]`.
        kwargs: further arguments of the layer.
    """
    cache, mask = KeysBeside(*cached), None if mask is None else pad(mask, (0, rows.shape[1]), value=1)
    arguments = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "cache_position")}
    arguments |= {"past_key_values": cache, "position_embeddings": rope, "position_ids": None}
    arguments["attention_mask"] = CREATE_MASK[kind](
        config=decoder.config, inputs_embeds=rows, attention_mask=mask, past_key_values=cache, layer_idx=0
    )
    output = decoder.layers[number].forward(rows, **arguments)  # its hooks are for the prompt
    out: Tensor = output[0] if isinstance(output, tuple) else output
    return out


def rotary(decoder: Any, kind: str, rows: Tensor, positions: Tensor) -> Rope:
    """Return (cos, sin) `[B, R, d]` of rows at ``positions`` `[B, R]` or `[axes, B, R]`."""
    by_kind = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    embeddings: Rope = decoder.rotary_emb(rows, positions, *[kind] * by_kind)
    return embeddings


def norm_eps(decoder: Any) -> float:
    """Return the epsilon of an LLM's norms."""
    return float(getattr(decoder.config, "rms_norm_eps", 1e-6))


def _nothing(*ignored: Any) -> None:
    """Stand in for a reading: these probes return their inputs."""
