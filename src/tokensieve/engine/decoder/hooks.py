"""Hooks on the layers of the LLM: visual tokens leave before some of them.

In a prefill, the hook on a layer before which tokens leave lets the method decide and gathers the hidden states
(``_reduce``). The hooks on that and every later layer replace positions and mask by those of the shorter sequence
(``_shorten``). The cache of each layer then holds the tokens that this layer received, and one ``PrefixInfo`` per layer
is the bookkeeping for decode steps (``_translate``). Outside a call of the top-level model the hooks do nothing:
other code may call the LLM, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.budget import BudgetScope
from tokensieve.engine.budget_scope import methods_per_image
from tokensieve.engine.cache import PrefixInfo, decode_mask
from tokensieve.engine.decoder.compaction import check_compaction, prefixes_of_all, shorten_caches
from tokensieve.engine.decoder.compute import ComputeHooks
from tokensieve.engine.decoder.evidence import DecoderEvidence
from tokensieve.engine.decoder.masks import (
    CREATE_MASK,
    EXPLICIT_MASK_KERNELS,
    FULL,
    SLIDING,
    attention_kinds,
    check_registers,
    limit_to_window,
    shorten_mask,
)
from tokensieve.engine.decoder.sequence import Member, PrefillState
from tokensieve.engine.decoder.skip import SkipHooks
from tokensieve.engine.handoff import Prefill
from tokensieve.engine.inflight import InFlight
from tokensieve.engine.layer_budget import LayerBudget
from tokensieve.engine.prompt.placeholders import equal_groups
from tokensieve.engine.prompt.user_text import UserTextFinder
from tokensieve.engine.sizes import at_medians, carried_sizes, key_bias
from tokensieve.engine.wrapped import uncompiled
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, Positions, Repair
from tokensieve.methods.compute import ComputeMethod
from tokensieve.methods.registers import RegisterMethod
from tokensieve.methods.skip import SkipMethod
from tokensieve.models import Family
from tokensieve.models.versions import before_5_23, checkpoints_activations
from tokensieve.tokens import DecoderTokens


@dataclass
class DecodeStep:
    """A later call on a reduced cache.

    Attributes:
        prefixes: {layer: prefix} for the layers that received fewer tokens than the first.
        mask: `[B, L]`, the caller's, over all its columns; or ``None``.
        masks: the masks made so far, by prefix and kind of attention.
    """

    prefixes: dict[int, PrefixInfo]
    mask: Tensor | None
    masks: dict[tuple[int, str], Tensor | None] = field(default_factory=dict)


class DecoderHooks:
    """Hooks on the layers of one LLM, for one decoder method.

    Raises:
        Refusal: if the method names a layer that the LLM does not have, or an average that its layers cannot reach, or
            if layers attend in a way that cannot be shortened.
    """

    def __init__(
        self,
        family: Family,
        model: Any,
        method: DecoderMethod,
        positions: Positions,
        text_finder: UserTextFinder | None,
        scope: BudgetScope,
        flight: InFlight,
        layer_budget: LayerBudget | None = None,
        repair: Repair | None = None,
        net: nn.Module | None = None,
    ) -> None:
        self.decoder, self.method, self.positions = uncompiled(model.get_decoder()), method, positions
        self.text_finder, self.scope, self.flight = text_finder, scope, flight
        self.layer_budget, self.repair = layer_budget, repair
        self.first_position = family.first_position
        layers, config = list(self.decoder.layers), self.decoder.config
        self.depth, self.kinds = len(layers), attention_kinds(config)
        self.layers = method.layer_numbers(self.depth)
        self.window: int = config.sliding_window if SLIDING in self.kinds else 0
        self.per_layer_masks = family.per_layer_masks or set(self.kinds) != {FULL}
        _check_attention(config, set(self.kinds), self.per_layer_masks)
        method.check_average(self.layers, self.depth)
        if isinstance(method, RegisterMethod):
            check_registers(method, self.per_layer_masks, config._attn_implementation, repair)
        if method.leaves_caches:
            check_compaction(method, set(self.kinds), repair, len(self.layers) * (positions == "contiguous"))
        first = self.layers[0]
        one_of_each_kind = {self.kinds.index(kind, first) for kind in self.kinds[first:]}
        self._to_verify: Collection[int] = one_of_each_kind if family.untested else ()  # layers with unknown masks
        self.skips: SkipHooks | None = None
        self.compute: ComputeHooks | None = None
        if isinstance(method, SkipMethod):  # before any other hook, as this may be refused
            self.skips = SkipHooks(self.decoder, method, self.layers, flight, repair)
        elif isinstance(method, ComputeMethod):
            self.compute = ComputeHooks(self.decoder, method, self._create_mask, self.kinds, flight, repair)
        head = model.get_output_embeddings()
        self.evidence = DecoderEvidence(self.decoder, head, method, self.layers, self.kinds, flight, net)
        self._handles = [
            layer.register_forward_pre_hook(partial(self._before_layer, number), with_kwargs=True)
            for number, layer in enumerate(layers)
            if number >= self.evidence.first_layer or method.leaves_caches
        ]
        if hasattr(self.decoder, "_deepstack_process"):
            self.decoder._deepstack_process = partial(self._deepstack, self.decoder._deepstack_process)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.evidence.remove()
        for part in (self.skips, self.compute):
            if part is not None:
                part.remove()
        self.decoder.__dict__.pop("_deepstack_process", None)

    # -- around the forward -------------------------------------------------------------------------------------------

    def check(self, kwargs: dict[str, Any]) -> None:
        """Refuse a prompt that cannot be reduced inside the LLM, before anything runs."""
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise Refusal("new images on a filled cache cannot be reduced inside the LLM; start a new sequence")
        no_token_leaves = self.skips or self.compute
        if no_token_leaves is not None:
            no_token_leaves.check()
        elif kwargs.get("labels") is not None:
            raise Refusal("labels cannot be given with a decoder method: its logits are shorter; compute the loss")
        if before_5_23() and self.decoder.training and checkpoints_activations(self.decoder):
            raise Refusal(
                "before 5.23, transformers runs hooks twice under gradient checkpointing, so tokens would leave "
                "the LLM twice: turn it off, use a connector method, or install a newer release"
            )
        logits = kwargs.get("logits_to_keep")
        read = ("user_text", "gradient", "query_attention")
        reads_end = self.evidence.probes or any(map(self.method.needs.requests, read))
        if reads_end and isinstance(logits, int) and logits > 1:
            raise Refusal(
                f"{self.method.info.name} goes by the end of the prompt, which assisted decoding hides behind "
                "candidates; generate without an assistant (or, in a plain forward, with logits_to_keep=1)"
            )

    def start_prefill(self, prefill: Prefill) -> None:
        """Start a prompt, as the connector stage left it.

        Raises:
            Refusal: if a budget is out of reach for an image, a row has no user text, or it is shorter than what the
                method reads.
        """
        entered = [[image.entered for image in images] for images in prefill.images]
        if self.layer_budget is None:
            methods = methods_per_image(self.method, self.scope, entered)
        else:
            inside = self.layer_budget.inside
            methods = [[inside(image.layout.patches, image.entered) for image in images] for images in prefill.images]
        reached = max((-place for place in self.evidence.needs.gradient or ()), default=0)
        for row, (row_methods, sizes) in enumerate(zip(methods, entered, strict=True)):
            columns = prefill.lengths[row] - int(prefill.visual[row].sum()) if reached else 0
            for method, patches in zip(row_methods, sizes, strict=True):
                budgets = method.stage_budgets(patches, self.layers, self.depth) or []
                columns += [patches, *budgets][len(self.layers) - 1] if reached else 0  # they enter the last layer
            if sizes and columns < reached:
                raise Refusal(
                    f"{self.method} reads guesses off the last {reached} places of the prompt; {columns} are left of "
                    f"it at layer {self.layers[-1]}: ask a longer question, or set guesses and skip"
                )
        text = None
        if self.text_finder is not None:
            text = self.text_finder.find(prefill.kwargs["input_ids"], prefill.between_frames())
        self.flight.decoding = PrefillState.enter(prefill, methods, text)
        self.evidence.arm()

    def prefixes(self, state: PrefillState) -> dict[int, PrefixInfo]:
        """Return the bookkeeping of the layers' caches after a prefill; the entry's holds for all others."""
        if not self.method.leaves_caches:
            return state.prefixes
        return prefixes_of_all(state.prefixes, self.depth, state.prefill.prefix, self.positions == "contiguous")

    def start_decoding(self, prefixes: dict[int, PrefixInfo], mask: Tensor | None) -> None:
        """Start a step on a reduced cache; ``mask`` `[B, L]` is the caller's."""
        self.flight.decoding = DecodeStep(prefixes, mask)

    # -- a prefill ----------------------------------------------------------------------------------------------------

    def _before_layer(self, number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Replace the input of one layer."""
        state = self.flight.decoding
        if state is None:
            return None
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if isinstance(state, PrefillState):
            if number in self._to_verify:
                self._verify_mask(state, number, hidden, kwargs)
            if number in self.layers:
                entering = hidden
                hidden = self._reduce(state, number, hidden, kwargs)
                if self.skips is not None:
                    self.skips.start(state, entering)
            if number >= self.layers[0]:
                self._shorten(state, number, hidden, kwargs)
            if self.compute is not None:
                self.compute.before_layer(state, number, hidden, kwargs)
            self.evidence.copy_input(state, number, hidden)
        elif number in state.prefixes:
            self._translate(state, number, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def _verify_mask(self, state: PrefillState, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Refuse an unknown LLM whose layer does not receive the causal mask that would be shortened."""
        mask, causal = kwargs.get("attention_mask"), self._create_mask(number, hidden, kwargs, state.entry.mask)
        if not (mask is causal or (mask is not None and causal is not None and torch.equal(mask, causal))):
            raise Refusal("decoder methods need causal attention in every layer; this LLM's mask is another one")

    def _reduce(self, state: PrefillState, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Let the method decide about every image, and shorten the hidden states."""
        inputs = dict(kwargs)  # positions and mask of the sequence before tokens leave
        self._replace_positions_and_mask(state, number, hidden, inputs)
        self.evidence.collect(state, number, hidden, inputs)
        kept, cloned = [list(columns) for columns in state.sequence.images], False
        layouts = {member: state.image(member).remaining for member in state.members}
        patches = {}  # the columns of each image without those of its separators
        for member, layout in layouts.items():
            columns = state.columns(member)
            patches[member] = columns if layout.patch_index is None else columns[layout.patch_index]
        rope, stage = inputs["position_embeddings"], self.layers.index(number)

        def equal_images() -> Iterator[tuple[list[Member], DecoderTokens]]:
            """Group images of equal size, now and at the start, and of equal budget: they are decided about at once."""
            budgets = {member: self._budget(state, member, stage) for member in state.members}
            keys = [(len(patches[m]), budgets[m], *state.batch_key(m)) for m in state.members]
            for group in equal_groups(keys):
                members = [state.members[index] for index in group]
                columns = torch.stack([patches[member] for member in members])
                budget = budgets[members[0]]
                yield members, self.evidence.tokens(state, hidden, rope, members, columns, budget, number)

        if stage == 0 and self.method.adaptive:
            schedules: dict[Member, list[int]] = {}
            for members, tokens in equal_images():
                numbers = state.method(members[0]).schedule(tokens, self.layers, self.depth)
                schedules |= dict(zip(members, numbers, strict=True))
            state.schedules = schedules
        for members, tokens in equal_images():
            decisions = state.method(members[0])(tokens)
            for member, about_patches in zip(members, decisions, strict=True):
                decision = layouts[member].merge_parts([about_patches])
                decision = at_medians(decision) if self.repair == "restore" else decision
                (row, image), columns, sizes = member, state.columns(member), state.image(member).sizes
                if sizes is not None:
                    sizes = carried_sizes(sizes, decision, hidden[row, columns], layouts[member].separator)
                kept[row][image] = columns[decision.anchors]
                if decision.mixing is not None:  # merged rows take their anchors' places before the others leave
                    hidden, cloned = hidden if cloned else hidden.clone(), True
                    hidden[row, kept[row][image]] = decision.apply(hidden[row, columns])
                state.images[row][image] = state.images[row][image].then_decoder(decision, sizes)
        if number == self.layers[-1]:
            state.evidence.clear()  # nothing reads it any more: free the memory
        selection = state.drop(kept)
        if self.method.leaves_caches and selection is not None:
            shorten_caches(kwargs.get("past_key_values"), number, selection)
        return hidden if selection is None else selection.take_rows(hidden)

    def _budget(self, state: PrefillState, member: Member, stage: int) -> int:
        """Return the tokens that stay of an image at one of the method's layers; 0 for a method without a budget."""
        if member in state.schedules:
            return state.schedules[member][stage]
        if state.image(member).registers is not None:
            return state.image(member).decision.added
        return state.method(member).image_budget(state.image(member).entered, self.layers, self.depth, stage)

    def _shorten(self, state: PrefillState, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Give one layer the inputs of the shorter sequence, and record the bookkeeping for its cache."""
        state.tokens[number] = [[len(columns) for columns in images] for images in state.sequence.images]
        if state.untouched:
            return
        self._replace_positions_and_mask(state, number, hidden, kwargs)
        if state.prefix is None:
            state.prefix = self._prefix(state)
        state.prefixes[number] = state.prefix

    def _replace_positions_and_mask(
        self, state: PrefillState, number: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Replace positions and mask by those of the running sequence, in place."""
        if state.untouched:
            return
        kind = self.kinds[number]
        if kind not in state.layer_inputs:
            embeddings, ids = self._positions(state, kind, hidden, kwargs)
            mask = kwargs.get("attention_mask") if self.per_layer_masks else None
            if mask is not None:
                mask = shorten_mask(mask, state.sequence.columns)
            else:  # plain causal: made anew, which is quicker, or left to the kernel
                mask = self._create_mask(number, hidden, kwargs, state.sequence.mask)
            state.layer_inputs[kind] = {"position_embeddings": embeddings, "position_ids": ids, "attention_mask": mask}
        kwargs |= state.layer_inputs[kind]

    def _positions(
        self, state: PrefillState, kind: str, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Any, Tensor | None]:
        """Return position embeddings and ids of the running sequence, from those at the LLM's entry."""
        sequence, ids = state.sequence, kwargs.get("position_ids")
        embeddings = tuple(sequence.columns.take_rows(part) for part in kwargs["position_embeddings"])
        ids = None if ids is None else sequence.columns.take(ids)
        if self.positions == "contiguous":
            contiguous, rows = sequence.contiguous_positions() + self.first_position, state.renumbered_rows()
            embeddings = self._rotary(kind, hidden, contiguous, rows, embeddings)
            ids = contiguous if ids is None or rows is None else contiguous.where(rows, ids)
        return embeddings, ids

    def _rotary(self, kind: str, hidden: Tensor, positions: Tensor, rows: Tensor | None, unchanged: Any) -> Any:
        """Return (cos, sin) at ``positions`` `[B, n]` in the given rows, and ``unchanged`` in the others."""
        rope = getattr(self.decoder.config, "rope_parameters", None) or {}
        axes = positions.expand(3, *positions.shape) if "mrope_section" in rope else positions
        per_kind = "layer_type" in inspect.signature(self.decoder.rotary_emb.forward).parameters
        embeddings = self.decoder.rotary_emb(hidden, axes, *[kind] * per_kind)
        if rows is None:
            return embeddings
        return tuple(new.where(rows[..., None], old) for new, old in zip(embeddings, unchanged, strict=True))

    def _create_mask(
        self, number: int, hidden: Tensor, kwargs: dict[str, Any], mask: Tensor | None, allow_none: bool = True
    ) -> Tensor | None:
        """Return the causal mask of one layer, as transformers makes it.

        Args:
            mask: `[B, n]`, 0 on padding, or ``None``.
            allow_none: return ``None`` where the kernel is causal by itself.
        """
        causal: Tensor | None = CREATE_MASK[self.kinds[number]](
            config=self.decoder.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=kwargs.get("past_key_values"),
            layer_idx=number,
            allow_is_causal_skip=allow_none,
        )
        return causal

    def _prefix(self, state: PrefillState) -> PrefixInfo:
        """Return the bookkeeping of the running sequence, up to and including its last visual token."""
        sequence, entry = state.sequence, state.prefill.prefix
        after_images = state.prefill.visual.shape[1] - entry.mask.shape[1]
        end = sequence.visual.shape[1] - after_images
        mask = torch.ones_like(sequence.visual, dtype=torch.long) if sequence.mask is None else sequence.mask
        sizes = [image.sizes for of_row in state.images for image in of_row if image.sizes is not None]
        return PrefixInfo(
            mask[:, :end],
            sequence.columns.padded,
            entry.length,
            renumbered_rows=state.renumbered_rows() if self.positions == "contiguous" else None,
            original_columns=sequence.columns.index[:, :end] + entry.dropped if self.window else None,
            bias=key_bias(sequence.visual, sizes)[None, :, :end] if sizes else None,
        )

    def _deepstack(self, process: Any, hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
        """Add deepstack features after a layer to the tokens that are left, reduced as these were."""
        state = self.flight.decoding
        if isinstance(state, PrefillState) and not state.untouched:
            images = [image for of_row in state.images for image in of_row]
            per_image = torch.split(features, [image.decision.slots for image in images])
            reduced = [image.reduce_inside(rows) for image, rows in zip(images, per_image, strict=True)]
            features, visual = torch.cat(reduced), state.sequence.visual
        output: Tensor = process(hidden, visual, features)
        return output

    # -- a decode step ------------------------------------------------------------------------------------------------

    def _translate(self, step: DecodeStep, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Replace positions and mask of a decode step for one layer by those that fit its cache, in place."""
        prefix, cache, kind = step.prefixes[number], kwargs["past_key_values"], self.kinds[number]
        past = cache.get_seq_length(number)
        width = past + hidden.shape[1]
        slid = kind == SLIDING and width > self.window  # a column may be outside the window, or have left the cache
        if slid or kwargs.get("attention_mask") is not None or step.mask is not None or prefix.padded:
            if (id(prefix), kind) not in step.masks:
                by_column = decode_mask(prefix, step.mask, width)
                mask = self._create_mask(number, hidden, kwargs, by_column, allow_none=not slid)
                if slid and mask is not None:
                    mask = limit_to_window(mask, prefix, cache, number, self.window)
                step.masks[id(prefix), kind] = mask
            kwargs["attention_mask"] = step.masks[id(prefix), kind]
        if self.positions == "contiguous":
            # tokens before this step: those of the prefix that are not padding, and all later ones
            before = prefix.mask.sum(-1, keepdim=True) + past - prefix.length + self.first_position
            contiguous = before + torch.arange(hidden.shape[1], device=hidden.device)
            unchanged = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = self._rotary(kind, hidden, contiguous, prefix.renumbered_rows, unchanged)


def _check_attention(config: Any, kinds: set[str], per_layer_masks: bool) -> None:
    """Refuse an LLM whose layers attend in a way that cannot be shortened, or not with the kernel that it runs."""
    if not kinds <= CREATE_MASK.keys():
        unsupported = ", ".join(sorted(kinds - CREATE_MASK.keys()))
        raise Refusal(f"decoder methods need layers with {' or '.join(CREATE_MASK)}; this LLM has {unsupported}")
    if per_layer_masks and config._attn_implementation not in EXPLICIT_MASK_KERNELS:
        raise Refusal(
            "the layers of this LLM do not share one causal mask: decoder methods need "
            f"{' or '.join(EXPLICIT_MASK_KERNELS)} attention; it runs {config._attn_implementation}"
        )
