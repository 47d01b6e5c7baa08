"""The decoder stage: visual tokens leave between two blocks of the LLM.

In a prefill, the hook on a stage's block gathers the hidden states, and the hooks on it and on every later block hand
on positions and mask of the shorter sequence. Each block's cache then holds what that block saw; one
:class:`~tokensieve.attach.cache.State` per block is what later steps need. Outside a call of the top-level model the
hooks do nothing: the LLM may be called by others, too.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from tokensieve.attach.cache import State, step_mask
from tokensieve.attach.connector import Plan, Prefill
from tokensieve.attach.layout import Stream, equal_groups
from tokensieve.attach.probe import Probe, attention_of_queries
from tokensieve.attach.words import UserWords
from tokensieve.methods import DecoderMethod, Positions
from tokensieve.tokens import VisualTokens


@dataclass
class Run:
    """A prefill on its way through the blocks.

    Attributes:
        stream: the sequence as the next block will see it.
        entry: the sequence as the first block saw it.
        prefill: how it entered the LLM.
        plans: `[row][image]`, what became of each image so far.
        states: for every block from the first stage on, what later steps must know.
        tokens: visual tokens per image that each block saw, `[block][row][image]`.
        made: positions, mask and state of the current stream, made once for all blocks that share it.
        read: what the probe of the stage read: attention rows, keys.
        embeddings: `[B, L, D]`, what entered the LLM, for methods that need it.
    """

    stream: Stream
    entry: Stream
    prefill: Prefill
    plans: list[list[Plan]]
    states: dict[int, State] = field(default_factory=dict)
    tokens: dict[int, list[list[int]]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    read: tuple[Tensor | None, Tensor | None] = (None, None)
    embeddings: Tensor | None = None


@dataclass
class Step:
    """A later call on a reduced cache: the states, the caller's mask, and the masks made so far."""

    states: dict[int, State]
    mask: Tensor | None
    made: dict[int, Tensor | None] = field(default_factory=dict)


class DecoderHooks:
    """Hooks on the blocks of one LLM, for one decoder method.

    Raises:
        ValueError: if the method names a block that the LLM does not have.
    """

    def __init__(self, model: Any, method: DecoderMethod, positions: Positions, words: UserWords | None) -> None:
        self.decoder, self.method, self.positions, self.words = model.get_decoder(), method, positions, words
        self.blocks: list[Any] = list(self.decoder.layers)
        self.stages = method.stages(len(self.blocks))
        self._local = threading.local()
        self.probes: dict[int, Probe] = {}
        if method.needs.queries is not None or method.needs.keys:
            asked = {stage: stage - (not method.needs.own) for stage in self.stages}
            self.probes = {stage: Probe(self.blocks[a].self_attn, self._read) for stage, a in asked.items()}
        first = 0 if method.needs.entry else self.stages[0]
        self._handles = [
            block.register_forward_pre_hook(partial(self._enter, first + i), with_kwargs=True)
            for i, block in enumerate(self.blocks[first:])
        ]
        if hasattr(self.decoder, "_deepstack_process"):
            self.decoder._deepstack_process = partial(self._deepstack, self.decoder._deepstack_process)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for probe in self.probes.values():
            probe.remove()
        self.decoder.__dict__.pop("_deepstack_process", None)

    # -- called by the sieve ------------------------------------------------------------------------------------------

    def check(self, kwargs: dict[str, Any]) -> None:
        """Refuse a prompt that cannot be reduced inside the LLM, before anything runs."""
        if kwargs.get("labels") is not None:
            raise ValueError("labels cannot be given with a decoder method: its logits are shorter; compute the loss")
        if self.probes and isinstance(kwargs.get("logits_to_keep"), int) and kwargs["logits_to_keep"] > 1:
            raise ValueError(
                f"{self.method.info.name} scores by the last prompt token, which assisted decoding hides behind "
                "candidates; generate without an assistant"
            )

    def start(self, prefill: Prefill) -> None:
        """Arm the hooks for a prompt, as the connector stage left it."""
        words = self.words.find(prefill.kwargs["input_ids"]) if self.words is not None else None
        sizes = [[plan.decision.slots for plan in row] for row in prefill.plans]
        stream = Stream.enter(prefill.visual, prefill.kwargs.get("attention_mask"), sizes, words)
        self._local.call = Run(stream, stream, prefill, [list(row) for row in prefill.plans])
        for probe in self.probes.values():
            probe.arm()

    def resume(self, states: dict[int, State], mask: Tensor | None) -> None:
        """Arm the hooks for a step on a reduced cache; ``mask`` is the caller's."""
        self._local.call = Step(states, mask)

    def finish(self) -> Run | None:
        """Disarm; returns the prefill, if it was one."""
        call, self._local.call = getattr(self._local, "call", None), None
        for probe in self.probes.values():
            probe.take()
        return call if isinstance(call, Run) else None

    # -- the hooks ----------------------------------------------------------------------------------------------------

    def _enter(self, number: int, block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        call: Run | Step | None = getattr(self._local, "call", None)
        if call is None:
            return None
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if isinstance(call, Step) and number in call.states:
            self._translate(call, number, hidden, kwargs)
        elif isinstance(call, Run):
            if number == 0:
                call.embeddings = hidden
            if number in self.stages:
                hidden = self._reduce(call, number, hidden, kwargs)
            if number >= self.stages[0]:
                self._shorten(call, number, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def _reduce(self, run: Run, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Decide at a stage, and shorten the hidden states."""
        stream = run.stream
        self._ask(run, number, hidden, kwargs)
        flat = [(row, image) for row, images in enumerate(stream.images) for image in range(len(images))]
        kept = [list(images) for images in stream.images]
        for group in equal_groups([(len(stream.images[r][i]), len(run.entry.images[r][i])) for r, i in flat]):
            members = [flat[g] for g in group]
            of = torch.tensor([r for r, _ in members], device=hidden.device)
            columns = torch.stack([stream.images[r][i] for r, i in members])
            tokens = self._evidence(run, number, hidden, members, of, columns)
            decision = self.method(tokens)
            slots = columns.gather(1, decision.anchors)
            if decision.mixing is not None:
                hidden = hidden.index_put((of[:, None], slots), decision.apply(tokens.features))
            for (r, i), slot, one in zip(members, slots, decision, strict=True):
                kept[r][i], run.plans[r][i] = slot, run.plans[r][i].then_inside(one)
        run.stream, chosen = stream.keep(kept)
        run.made.clear()
        return chosen.take_rows(hidden)

    def _shorten(self, run: Run, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Positions and mask of the shorter sequence for one block, and what its cache must remember."""
        stream, made = run.stream, run.made
        run.tokens[number] = [[len(columns) for columns in images] for images in stream.images]
        if "state" not in made:
            made["state"] = _state(run)
        run.states[number] = made["state"]
        if stream.width == run.prefill.visual.shape[1]:
            return
        if "mask" not in made:
            made["positions"] = self._positions(stream, hidden, kwargs)
            made["mask"] = self._mask(number, hidden, kwargs, stream.mask)
        kwargs["position_embeddings"], kwargs["position_ids"] = made["positions"]
        kwargs["attention_mask"] = made["mask"]

    def _positions(self, stream: Stream, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Any, Tensor | None]:
        ids = kwargs.get("position_ids")
        if self.positions == "contiguous":
            numbered = stream.numbered()
            return self._rotary(hidden, numbered), numbered
        embeddings = tuple(stream.columns.take_rows(part) for part in kwargs["position_embeddings"])
        return embeddings, None if ids is None else stream.columns.take(ids)

    def _rotary(self, hidden: Tensor, numbered: Tensor) -> Any:
        axes = numbered.expand(3, *numbered.shape) if "mrope_section" in self._rope() else numbered
        return self.decoder.rotary_emb(hidden, axes)

    def _rope(self) -> dict[str, Any]:
        return getattr(self.decoder.config, "rope_parameters", None) or {}

    def _translate(self, step: Step, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Positions and mask of a later step for one block, by what its cache holds."""
        state, cache = step.states[number], kwargs["past_key_values"]
        if kwargs.get("attention_mask") is not None or step.mask is not None or state.padded:
            if id(state) not in step.made:
                mask = step_mask(state, step.mask, cache.get_seq_length(number) + hidden.shape[1])
                step.made[id(state)] = self._mask(number, hidden, kwargs, mask)
            kwargs["attention_mask"] = step.made[id(state)]
        if self.positions == "contiguous":
            held = state.mask.sum(-1, keepdim=True) + cache.get_seq_length(number) - state.length
            numbered = held + torch.arange(hidden.shape[1], device=hidden.device)
            kwargs["position_embeddings"] = self._rotary(hidden, numbered)

    def _mask(self, number: int, hidden: Tensor, kwargs: dict[str, Any], mask: Tensor | None) -> Tensor | None:
        made: Tensor | None = create_causal_mask(
            config=self.decoder.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=kwargs.get("past_key_values"),
            layer_idx=number,
        )
        return made

    # -- evidence -----------------------------------------------------------------------------------------------------

    def _evidence(
        self, run: Run, number: int, hidden: Tensor, members: list[tuple[int, int]], of: Tensor, columns: Tensor
    ) -> VisualTokens:
        """What the method sees of equal images: ``members`` are (row, image), ``columns`` `[G, N]` their tokens."""
        needs, stream, rows = self.method.needs, run.stream, of[:, None]
        queries, keys = run.read
        words = None if stream.words is None else stream.words[0][of]
        plans = [run.prefill.plans[r][i] for r, i in members]
        entry = text_entry = None
        if run.embeddings is not None:
            first = torch.stack([run.entry.images[r][i] for r, i in members])
            entry = run.embeddings[rows, first]
            text_entry = None if run.entry.words is None else run.embeddings[rows, run.entry.words[0][of]]
        rows_of = self.decoder.norm(hidden) if needs.normed else hidden
        return VisualTokens(
            rows_of[rows, columns],
            grid=plans[0].decision.grid if columns.shape[1] == plans[0].decision.total else None,
            text=None if words is None else rows_of[rows, words],
            text_mask=None if stream.words is None else stream.words[1][of],
            queries=None if queries is None else queries[of].take_along_dim(columns[:, None, None], -1),
            keys=None if keys is None else keys[rows, columns],
            text_keys=None if keys is None or words is None else keys[rows, words],
            entry=entry,
            text_entry=text_entry,
            stage=self.stages.index(number),
            depth=len(self.blocks),
            entered=plans[0].decision.slots,
        )

    def _ask(self, run: Run, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Take what the probe of a stage read in the block before, or ask the stage's own block ahead."""
        if number not in self.probes:
            return
        probe = self.probes[number]
        if self.method.needs.own:
            ahead = dict(kwargs, past_key_values=None)
            self._shorten(replace(run, states={}, tokens={}, made={}), number, hidden, ahead)
            with probe.only():  # runs the block up to its queries and keys, no further
                self.blocks[number].forward(hidden, **ahead)
        (run.read,) = probe.take()

    def _read(self, query: Tensor, key: Tensor, scaling: float) -> tuple[Tensor | None, Tensor | None]:
        """Rows of the wanted queries, `[B, H, Q, n]`, and keys with heads side by side, `[B, n, E]`."""
        needs, stream = self.method.needs, self._local.call.stream
        rows = keys = None
        if needs.queries == "words":
            rows = attention_of_queries(query, key, scaling, stream.words[0], stream.mask)
        elif needs.queries == "last":
            last = torch.full((len(query), 1), query.shape[-2] - 1, device=query.device)
            rows = attention_of_queries(query, key, scaling, last, stream.mask)
        if needs.keys:
            keys = key.transpose(1, 2).flatten(2)
        return rows, keys

    def _deepstack(self, process: Any, hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
        """Deepstack features are added after a block: to the tokens that are left, reduced as they were."""
        call = getattr(self._local, "call", None)
        if isinstance(call, Run) and call.stream.width < call.prefill.visual.shape[1]:
            parts = torch.split(features, [p.decision.slots for row in call.prefill.plans for p in row])
            plans = [p for row in call.plans for p in row]
            left = [x if p.inside is None else p.inside.apply(x) for p, x in zip(plans, parts, strict=True)]
            features = torch.cat(left)
            visual = call.stream.visual
        out: Tensor = process(hidden, visual, features)
        return out


def _state(run: Run) -> State:
    stream, entry = run.stream, run.prefill.state
    tail = run.prefill.visual.shape[1] - entry.mask.shape[1]
    mask = torch.ones_like(stream.visual, dtype=torch.long) if stream.mask is None else stream.mask
    return State(mask[:, : stream.width - tail], entry.padded or stream.columns.padded, entry.length, None)
