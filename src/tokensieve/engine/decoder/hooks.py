"""The decoder stage: visual tokens leave between two blocks of the LLM.

In a prefill, the hook on a stage's block lets the method decide and gathers the hidden states (``_reduce``); the hooks
on it and on every later block hand on positions and mask of the shorter sequence (``_shorten``). Each block's cache
then holds what that block saw, and one :class:`~tokensieve.engine.cache.PrefixInfo` per block is what later steps need
(``_translate``). Outside a call of the top-level model the hooks do nothing: the LLM may be called by others, too.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokensieve.engine.cache import PrefixInfo, step_mask
from tokensieve.engine.connector.decide import Scope, per_sample
from tokensieve.engine.connector.prefill import Prefill
from tokensieve.engine.decoder.evidence import DecoderEvidence
from tokensieve.engine.decoder.masks import FULL, MADE, SLIDING, WHOLE, in_window, kinds_of, shortened
from tokensieve.engine.decoder.sequence import PrefillState
from tokensieve.engine.prompt.placeholders import equal_groups
from tokensieve.engine.prompt.user_text import UserTextFinder
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, Positions
from tokensieve.models import Family, TokenLayout


@dataclass
class DecodeStep:
    """A later call on a reduced cache: the states, the caller's mask, and the masks made so far."""

    states: dict[int, PrefixInfo]
    mask: Tensor | None
    made: dict[tuple[int, str], Tensor | None] = field(default_factory=dict)


class DecoderHooks:
    """Hooks on the blocks of one LLM, for one decoder method.

    Raises:
        ValueError: if the method names a block that the LLM does not have, an average that its stages cannot reach, or
            if blocks attend in a way that cannot be shortened.
    """

    def __init__(
        self,
        family: Family,
        model: Any,
        method: DecoderMethod,
        positions: Positions,
        words: UserTextFinder | None,
        scope: Scope = "image",
    ) -> None:
        self.decoder, self.method, self.positions, self.words = model.get_decoder(), method, positions, words
        self.scope, self.first_position = scope, family.first_position
        blocks, config = list(self.decoder.layers), self.decoder.config
        self.depth, self.stages, self.kinds = len(blocks), method.stages(len(blocks)), kinds_of(config)
        self.window: int = config.sliding_window if SLIDING in self.kinds else 0
        self.own_masks = family.own_masks or set(self.kinds) != {FULL}
        _check_attention(config, set(self.kinds), self.own_masks)
        method.check_average(self.depth)
        first_of_kind = {self.kinds.index(kind, self.stages[0]) for kind in self.kinds[self.stages[0] :]}
        self._to_verify = first_of_kind if family.untested else set()
        self._local = threading.local()
        self.evidence = DecoderEvidence(self.decoder, method, self.stages, self.kinds, self._current)
        self._handles = [
            block.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True)
            for number, block in enumerate(blocks)
            if number >= self.evidence.first
        ]
        if hasattr(self.decoder, "_deepstack_process"):
            self.decoder._deepstack_process = partial(self._deepstack, self.decoder._deepstack_process)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.evidence.remove()
        self.decoder.__dict__.pop("_deepstack_process", None)

    # -- called by the sieve ------------------------------------------------------------------------------------------

    def check(self, kwargs: dict[str, Any]) -> None:
        """Refuse a prompt that cannot be reduced inside the LLM, before anything runs."""
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise Refusal("new images on a filled cache cannot be reduced inside the LLM; start a new sequence")
        if kwargs.get("labels") is not None:
            raise Refusal("labels cannot be given with a decoder method: its logits are shorter; compute the loss")
        logits = kwargs.get("logits_to_keep")
        if (self.evidence.probes or self.method.needs.text) and isinstance(logits, int) and logits > 1:
            raise Refusal(
                f"{self.method.info.name} goes by the end of the prompt, which assisted decoding hides behind "
                "candidates; generate without an assistant (or, in a plain forward, with logits_to_keep=1)"
            )

    def start(self, prefill: Prefill) -> None:
        """Arm the hooks for a prompt, as the connector stage left it.

        Raises:
            ValueError: if a budget is out of reach for an image, or a row has no words to go by.
        """
        entered = [[plan.entered for plan in plans] for plans in prefill.plans]
        methods = per_sample(self.method, self.scope, entered)
        for own, sizes in zip(methods, entered, strict=True):
            for method, patches in zip(own, sizes, strict=True):
                method.per_stage(patches, self.depth)
        words = None
        if self.words is not None:
            words = self.words.find(prefill.kwargs["input_ids"], prefill.between_frames())
        self._local.call = PrefillState.enter(prefill, methods, words)
        self.evidence.arm()

    def resume(self, states: dict[int, PrefixInfo], mask: Tensor | None) -> None:
        """Arm the hooks for a step on a reduced cache; ``mask`` is the caller's."""
        self._local.call = DecodeStep(states, mask)

    def finish(self) -> PrefillState | None:
        """Disarm; returns the prefill, if it was one."""
        run, self._local.call = self._current(), None
        self.evidence.disarm()
        return run

    def _current(self) -> PrefillState | None:
        call = getattr(self._local, "call", None)
        return call if isinstance(call, PrefillState) else None

    # -- a prefill ----------------------------------------------------------------------------------------------------

    def _enter(self, number: int, block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What every hooked block does before it runs."""
        call: PrefillState | DecodeStep | None = getattr(self._local, "call", None)
        if call is None:
            return None
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if isinstance(call, PrefillState):
            if number in self._to_verify:
                self._verify(call, number, hidden, kwargs)
            if number in self.stages:
                hidden = self._reduce(call, number, hidden, kwargs)
            if number >= self.stages[0]:
                self._shorten(call, number, hidden, kwargs)
            self.evidence.watch(call, number, hidden)
        elif number in call.states:
            self._translate(call, number, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def _verify(self, run: PrefillState, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Refuse an unknown LLM whose blocks are not given the causal mask that this stage would shorten."""
        given, causal = kwargs.get("attention_mask"), self._made(number, hidden, kwargs, run.entry.mask)
        if not (given is causal or (given is not None and causal is not None and torch.equal(given, causal))):
            raise Refusal("decoder methods need causal attention in every block; this LLM's mask is another one")

    def _reduce(self, run: PrefillState, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Let the method decide at a stage, and shorten the hidden states."""
        before = dict(kwargs)  # positions and mask of the sequence as it is until now
        self._hand_on(run, number, hidden, before)
        self.evidence.ask(run, number, hidden, before)
        images = run.stream.images
        kept, cloned = [list(of_row) for of_row in images], False
        flat = [(row, image) for row, of_row in enumerate(images) for image in range(len(of_row))]
        shapes = {member: run.plan(member).left for member in flat}
        patches = {(r, i): _patches(images[r][i], shapes[r, i]) for r, i in flat}
        # images of equal size, now and at the start, are decided upon in one call
        for group in equal_groups([(len(patches[member]), *run.kind(member)) for member in flat]):
            members = [flat[g] for g in group]
            columns = torch.stack([patches[member] for member in members])
            tokens = self.evidence.tokens(run, number, hidden, before["position_embeddings"], members, columns)
            for (row, image), decision in zip(members, run.method(members[0])(tokens), strict=True):
                one, columns = shapes[row, image].merge_parts([decision]), images[row][image]
                kept[row][image] = columns[one.anchors]
                if one.mixing is not None:  # merged rows take their anchors' places before the others leave
                    hidden, cloned = hidden if cloned else hidden.clone(), True
                    hidden[row, kept[row][image]] = one.apply(hidden[row, columns])
                run.plans[row][image] = run.plans[row][image].then_inside(one)
        if number == self.stages[-1]:
            run.seen.clear()  # nobody will ask again: free the memory
        chosen = run.move(kept)
        return hidden if chosen is None else chosen.take_rows(hidden)

    def _shorten(self, run: PrefillState, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Give one block what belongs to the shorter sequence, and note what its cache must remember."""
        run.tokens[number] = [[len(columns) for columns in images] for images in run.stream.images]
        if run.untouched:
            return
        self._hand_on(run, number, hidden, kwargs)
        if run.state is None:
            run.state = self._state(run)
        run.states[number] = run.state

    def _hand_on(self, run: PrefillState, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Replace positions and mask by those of the stream, in place."""
        if run.untouched:
            return
        kind = self.kinds[number]
        if kind not in run.handed:
            embeddings, ids = self._positions(run, kind, hidden, kwargs)
            mask = kwargs.get("attention_mask") if self.own_masks else None
            if mask is not None:
                mask = shortened(mask, run.stream.columns)
            else:  # plain causal: made anew, which is quicker, or left to the kernel
                mask = self._made(number, hidden, kwargs, run.stream.mask)
            run.handed[kind] = {"position_embeddings": embeddings, "position_ids": ids, "attention_mask": mask}
        kwargs |= run.handed[kind]

    def _positions(
        self, run: PrefillState, kind: str, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Any, Tensor | None]:
        """Position embeddings and ids of the stream, from those of the entry."""
        columns, ids = run.stream.columns, kwargs.get("position_ids")
        embeddings = tuple(columns.take_rows(part) for part in kwargs["position_embeddings"])
        ids = None if ids is None else columns.take(ids)
        if self.positions == "contiguous":
            numbered, rows = run.stream.numbered() + self.first_position, run.renumbered()
            embeddings = self._renumber(kind, hidden, numbered, rows, embeddings)
            ids = numbered if ids is None or rows is None else numbered.where(rows, ids)
        return embeddings, ids

    def _renumber(self, kind: str, hidden: Tensor, numbered: Tensor, rows: Tensor | None, otherwise: Any) -> Any:
        """(cos, sin) at the positions ``numbered`` `[B, n]` in the given rows, ``otherwise`` in the others."""
        rope = getattr(self.decoder.config, "rope_parameters", None) or {}
        axes = numbered.expand(3, *numbered.shape) if "mrope_section" in rope else numbered
        by_kind = "layer_type" in inspect.signature(self.decoder.rotary_emb.forward).parameters
        made = self.decoder.rotary_emb(hidden, axes, *[kind] * by_kind)
        if rows is None:
            return made
        return tuple(new.where(rows[..., None], old) for new, old in zip(made, otherwise, strict=True))

    def _made(
        self, number: int, hidden: Tensor, kwargs: dict[str, Any], mask: Tensor | None, skip: bool = True
    ) -> Tensor | None:
        """The causal mask of one block, as transformers makes it; ``skip``: ``None`` where the kernel has its own."""
        made: Tensor | None = MADE[self.kinds[number]](
            config=self.decoder.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=kwargs.get("past_key_values"),
            layer_idx=number,
            allow_is_causal_skip=skip,
        )
        return made

    def _state(self, run: PrefillState) -> PrefixInfo:
        stream, entry = run.stream, run.prefill.state
        tail = run.prefill.visual.shape[1] - entry.mask.shape[1]
        mask = torch.ones_like(stream.visual, dtype=torch.long) if stream.mask is None else stream.mask
        renumbered = run.renumbered() if self.positions == "contiguous" else None
        end, stood = stream.width - tail, None
        if self.window:
            stood = stream.columns.index[:, :end] + entry.dropped
        return PrefixInfo(mask[:, :end], stream.columns.padded, entry.length, renumbered=renumbered, columns=stood)

    def _deepstack(self, process: Any, hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
        """Deepstack features are added after a block: to the tokens that are left, reduced as they were."""
        run = self._current()
        if run is not None and not run.untouched:
            plans = [plan for of_row in run.plans for plan in of_row]
            parts = torch.split(features, [plan.decision.slots for plan in plans])
            features = torch.cat([plan.reduce_inside(part) for plan, part in zip(plans, parts, strict=True)])
            visual = run.stream.visual
        out: Tensor = process(hidden, visual, features)
        return out

    # -- a later step -------------------------------------------------------------------------------------------------

    def _translate(self, step: DecodeStep, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Positions and mask of a later step for one block, by what its cache holds."""
        state, cache, kind = step.states[number], kwargs["past_key_values"], self.kinds[number]
        seen = cache.get_seq_length(number)
        width = seen + hidden.shape[1]
        slid = kind == SLIDING and width > self.window  # something may be out of the window, or of the cache
        if slid or kwargs.get("attention_mask") is not None or step.mask is not None or state.padded:
            if (id(state), kind) not in step.made:
                mask = self._made(number, hidden, kwargs, step_mask(state, step.mask, width), skip=not slid)
                if slid and mask is not None:
                    mask = in_window(mask, state, cache, number, self.window)
                step.made[id(state), kind] = mask
            kwargs["attention_mask"] = step.made[id(state), kind]
        if self.positions == "contiguous":
            held = state.mask.sum(-1, keepdim=True) + seen - state.length + self.first_position
            numbered = held + torch.arange(hidden.shape[1], device=hidden.device)
            given = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = self._renumber(kind, hidden, numbered, state.renumbered, given)


def _patches(columns: Tensor, shape: TokenLayout) -> Tensor:
    """Those of an image's columns that hold patches."""
    return columns if shape.places is None else columns[shape.places]


def _check_attention(config: Any, kinds: set[str], own_masks: bool) -> None:
    """Refuse an LLM whose blocks attend in a way that cannot be shortened, or not with the kernel that it runs.

    Raises:
        ValueError: naming it.
    """
    if not kinds <= MADE.keys():
        other = ", ".join(sorted(kinds - MADE.keys()))
        raise Refusal(f"decoder methods need blocks with {' or '.join(MADE)}; this LLM has {other}")
    if own_masks and config._attn_implementation not in WHOLE:
        raise Refusal(
            "the blocks of this LLM do not share one causal mask: decoder methods need "
            f"{' or '.join(WHOLE)} attention; it runs {config._attn_implementation}"
        )
