"""Read the evidence that a decoder method requests while the layers run, and hand it out where tokens leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map_only

from tokensieve.engine.decoder.learned_query import LearnedQuery
from tokensieve.engine.decoder.sequence import Member, PrefillState
from tokensieve.engine.decoder.side import check_side_blocks, read_beside
from tokensieve.engine.inflight import InFlight
from tokensieve.engine.probe import Probe
from tokensieve.engine.prompt.placeholders import on_device
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, DecoderNeeds
from tokensieve.methods.side import SideBlocks
from tokensieve.ops import attention_of_queries
from tokensieve.tokens import ByLayer, DecoderTokens, DecoderUserText

ABOUT_TEXT = {f.name for f in fields(DecoderUserText)}


class DecoderEvidence:
    """Reads from the layers of one LLM the evidence that one method requests, and nothing else.

    Args:
        decoder: the LLM.
        head: maps its normed output to logits; ``None`` if the model has no output head.
        method: the method.
        layers: the layers before which it drops tokens.
        kinds: the kind of attention of each layer.
        net: the net of a trained method.

    Raises:
        Refusal: if the method requests the rotary embedding, and layers have different ones; or a gradient, and the
            model has no output head or weights that cannot be in a graph.
    """

    def __init__(
        self,
        decoder: Any,
        head: Any,
        method: DecoderMethod,
        layers: Sequence[int],
        kinds: Sequence[str],
        flight: InFlight,
        net: nn.Module | None = None,
    ) -> None:
        assert isinstance(method.needs, DecoderNeeds)
        if method.needs.gradient and head is None:
            raise Refusal(f"{method} guesses words by the model's output head; this model has none")
        if method.needs.gradient and any(weight.is_inference() for weight in decoder.parameters()):
            raise Refusal(f"{method} goes by a gradient; load the model outside of torch.inference_mode()")
        self.head, self.net = head, net
        self.decoder, self.needs, self.layers, self.flight = decoder, method.needs, layers, flight
        self.requested = self.needs.requested()
        if any(kind.rope is not None for kind in self.requested.values()) and len(set(kinds)) > 1:
            raise Refusal(f"{method} goes by the rotary embedding; in this LLM, layers differ in it or have none")
        self.probes: dict[int, Probe] = {}
        if self.needs.side_blocks:
            assert isinstance(net, SideBlocks)
            check_side_blocks(method, net, kinds)
            attention = net[-1].self_attn
            softcap = getattr(attention, "attn_logit_softcapping", None)
            self.probes[layers[0]] = Probe(attention, partial(self._read, softcap), flight)
        elif self.needs.reads_attention:
            for layer in layers:
                read_layer = decoder.layers[layer if self.needs.same_layer else layer - 1]
                softcap = getattr(read_layer.self_attn, "attn_logit_softcapping", None)
                self.probes[layer] = Probe(read_layer.self_attn, partial(self._read, softcap), flight)
        self._handles = []
        if self._copied("MLP input"):
            mlps = [decoder.layers[layer - 1].mlp for layer in layers]
            self._handles = [mlp.register_forward_pre_hook(self._before_mlp) for mlp in mlps]

        self.query: LearnedQuery | None = None
        if self.needs.query_attention is not None:
            self.query = LearnedQuery(decoder, layers[0], kinds, self.needs.query_attention, flight, net)

    @property
    def first_layer(self) -> int:
        """The first layer whose input must be passed to :meth:`copy_input`."""
        if self._copied("LLM input"):
            return 0
        # layer and MLP inputs are those of the layer before
        return self.layers[0] - bool(self._copied("layer input") or self._copied("MLP input"))

    def remove(self) -> None:
        for probe in self.probes.values():
            probe.remove()
        for handle in self._handles:
            handle.remove()
        if self.query is not None:
            self.query.remove()

    def arm(self) -> None:
        """Read from now on, until the forward ends."""
        for probe in self.probes.values():
            probe.arm()
        if self.query is not None:
            self.query.arm()

    # -- reading ------------------------------------------------------------------------------------------------------

    def copy_input(self, state: PrefillState, layer: int, hidden: Tensor) -> None:
        """Keep the hidden states `[B, n, D]` that enter a layer, where they are evidence."""
        if layer == 0:
            state.evidence |= dict.fromkeys(self._copied("LLM input"), hidden)
        if layer + 1 in self.layers:
            state.evidence |= dict.fromkeys(self._copied("layer input"), hidden)

    def collect(self, state: PrefillState, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Take the reading of the previous layer, or run this layer up to its queries and keys to get one.

        Args:
            hidden, kwargs: the input `[B, n, D]` of ``layer``, before which tokens leave, and its other arguments.
        """
        extra_run = self.needs.gradient or self.needs.same_layer or self.needs.side_blocks
        if self.flight.repair is not None and extra_run:
            kwargs = self.flight.repair.of_reading(layer, hidden, kwargs)  # this run passes the layer's hooks by
        if self.needs.gradient:
            state.evidence["gradient"] = self._gradient(layer, hidden, kwargs, self.needs.gradient)
        if layer not in self.probes:
            state.evidence.pop("attention", None)  # of side blocks: it was read of more columns
            return
        probe = self.probes[layer]
        if self.needs.side_blocks:
            assert isinstance(self.net, SideBlocks)
            read_beside(self.net, probe, hidden, kwargs)
        elif self.needs.same_layer:
            with probe.stop_at_reading():
                self.decoder.layers[layer].forward(hidden, **{**kwargs, "past_key_values": None})
        (reading,) = probe.take()
        state.evidence |= reading

    def _gradient(self, layer: int, hidden: Tensor, kwargs: dict[str, Any], places: tuple[int, ...]) -> Tensor:
        """Return the gradient `[B, n, D]` of the guesses at these places to the input of a layer.

        No weight gets a gradient. The sum over the batch keeps samples apart, because none sees another.
        """

        def usable(part: Tensor) -> Tensor:  # a tensor of inference mode cannot be in a graph, a copy of it can
            return part.clone() if part.is_inference() else part

        with torch.inference_mode(False), torch.enable_grad():
            entering = usable(hidden).detach().clone().requires_grad_()
            arguments = tree_map_only(Tensor, usable, {**kwargs, "past_key_values": None})
            output = self.decoder.layers[layer].forward(entering, **arguments)
            output = output[0] if isinstance(output, tuple) else output
            logits = self.head(self.decoder.norm(output[:, list(places)])).float().flatten(0, 1)
            loss = cross_entropy(logits, logits.argmax(-1), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, entering)
        return gradient

    def _copied(self, hidden_state: str) -> list[str]:
        """Return the requested evidence that is a copy of these hidden states."""
        return [name for name, kind in self.requested.items() if kind.hidden == hidden_state]

    def _before_mlp(self, mlp: nn.Module, args: Any) -> None:
        if isinstance(self.flight.decoding, PrefillState):
            self.flight.decoding.evidence |= dict.fromkeys(self._copied("MLP input"), args[0])

    def _read(
        self, softcap: float | None, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, value: Tensor
    ) -> dict[str, Tensor]:
        """Read one attention module: rows of the requested queries, `[B, H, Q, n]`, and rows per token."""
        state = self.flight.decoding
        assert isinstance(state, PrefillState)  # probes are armed in prefills only
        reading = {
            name: kind.read(query, key, scaling, mask) for name, kind in self.requested.items() if kind.read is not None
        }
        rows = {}
        if self.needs.attention is not None:
            columns = torch.full((len(query), 1), query.shape[-2] - 1, device=query.device)  # the last token
            if self.needs.attention == "words":
                assert state.sequence.text is not None
                columns = state.sequence.text[0]
            rows["attention"] = columns
        if self.needs.separator_attention:
            rows["separator_attention"] = state.columns_after_images()
        explicit = isinstance(mask, Tensor) and mask.ndim == 4
        mask = mask if explicit else state.sequence.mask
        bias = None
        if self.flight.repair is not None and not explicit:  # an explicit mask has the bias of repaired attention
            bias = self.flight.repair.keys
        for name, columns in rows.items():
            reading[name] = attention_of_queries(query, key, scaling, columns, mask, softcap, bias)
        return reading

    # -- handing out --------------------------------------------------------------------------------------------------

    def tokens(
        self,
        state: PrefillState,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        members: Sequence[Member],
        columns: Tensor,
        budget: int,
        layer: int,
    ) -> DecoderTokens:
        """Return the tokens of G equal images, `[G, N]`.

        Args:
            hidden: `[B, n, D]`, the input of the layer, before tokens leave.
            rope: (cos, sin) `[B, n, d]` of that sequence.
            members: the images.
            columns: `[G, N]`, the columns of their patches in the sequence.
            budget: tokens to keep of each image.
            layer: the layer before which tokens leave.
        """
        rows = on_device([row for row, _ in members], hidden.device)

        def take(sequence: Tensor, columns: Tensor) -> Tensor:
            return sequence.expand(len(hidden), -1, -1)[rows[:, None], columns]

        features = self.decoder.norm(hidden) if self.needs.final_norm else hidden
        per_column = {name: kind.rope(*rope) for name, kind in self.requested.items() if kind.rope is not None}
        per_column |= state.evidence
        about_text: dict[str, Any] = {}
        if state.sequence.text is not None and state.entry.text is not None:
            text_columns, mask = (part[rows] for part in state.sequence.text)
            about_text = {"features": take(features, text_columns), "mask": mask}
            for name in per_column.keys() & ABOUT_TEXT:
                at_entry = name in self._copied("LLM input")  # these rows stand where they entered the LLM
                about_text[name] = take(per_column[name], state.entry.text[0][rows] if at_entry else text_columns)
        about_image: dict[str, Any] = {}
        for name, sequence in per_column.items():
            if name == "attention":  # `[B, H, Q, n]`: the columns are on the last axis
                about_image[name] = sequence[rows].take_along_dim(columns[:, None, None], -1)
            elif name == "separator_attention":  # `[B, H, I, n]`: one query for each image of a row
                numbers = on_device([number for _, number in members], hidden.device)
                about_image[name] = sequence[rows, :, numbers].take_along_dim(columns[:, None], -1)
            elif name == "query_attention":  # `[B, H, n]`
                about_image[name] = sequence[rows].take_along_dim(columns[:, None], -1)
            elif name in self._copied("LLM input"):
                about_image[name] = take(sequence, torch.stack([_entry_columns(state, member) for member in members]))
            else:
                about_image[name] = take(sequence, columns)
        if self.needs.connector_scores:
            about_image["connector_scores"] = _connector_scores(state, members)
        images = [state.image(member) for member in members]
        if self.needs.requests("encoder_states"):
            about_image["encoder_states"] = ByLayer.stacked([image.states_left() for image in images])
        decision = images[0].decision
        if self.needs.grid and decision.grid is not None:
            anchors, width = torch.stack([image.anchors for image in images]), decision.grid[1]
            about_image["coordinates"] = torch.stack([anchors.div(width, rounding_mode="floor"), anchors % width], -1)
        whole = len(images[0].anchors) == decision.total and not decision.added
        return DecoderTokens(
            take(features, columns),
            grid=decision.grid if whole else None,
            frames=images[0].layout.frames if whole else None,
            budget=budget,
            entered=images[0].entered,
            layer=layer,
            net=self.net and self.net.to(features.device),
            user_text=DecoderUserText(**about_text) if about_text else None,
            **about_image,
        )


def _connector_scores(state: PrefillState, members: Sequence[Member]) -> Tensor | None:
    """Return the connector method's scores of the patches of equal images; ``None`` if it had none."""
    scores = []
    for image in map(state.image, members):
        if image.connector_scores is None:
            return None
        remaining, separator = image.reduce_inside(image.connector_scores[:, None])[:, 0], image.remaining.separator
        scores.append(remaining if separator is None else remaining[~separator])
    return torch.stack(scores)


def _entry_columns(state: PrefillState, member: Member) -> Tensor:
    """Return the columns of an image's patches when they entered the LLM."""
    row, number = member
    columns, image = state.entry.images[row][number], state.image(member)
    separator = image.layout.separator
    return columns if separator is None else columns[~separator[image.decision.anchors]]
