"""The handle of a method that is attached to an LLM with a vision encoder: it runs the stages in step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from tokensieve.budget import Budget, BudgetScope
from tokensieve.engine.cache import ATTRIBUTE, CacheInfo, emptied, info_of, remember, translate_decode_inputs
from tokensieve.engine.connector.prefill import Connector, shows
from tokensieve.engine.connector.registers import RegisterRows
from tokensieve.engine.decoder.hooks import DecoderHooks
from tokensieve.engine.decoder.sequence import PrefillState
from tokensieve.engine.encoder.beside import BesideHooks
from tokensieve.engine.encoder.hooks import EncoderHooks
from tokensieve.engine.handle import Sieve
from tokensieve.engine.handoff import Decisions, ImageReduction
from tokensieve.engine.inflight import InFlight
from tokensieve.engine.layer_budget import LayerBudget
from tokensieve.engine.nets import depth_of, load_nets
from tokensieve.engine.prefusion import Prefusion
from tokensieve.engine.prompt.user_text import UserTextFinder
from tokensieve.engine.repair import RepairHooks
from tokensieve.engine.turns import Conversation, RunningTurn, check_call, new_columns
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, Method, Needs, PixelMethod, Positions, Repair, Stage
from tokensieve.methods.registers import RegisterMethod
from tokensieve.models import Family, families, family_of
from tokensieve.models.layout import Separators
from tokensieve.models.versions import before_5_23


class LlmSieve(Sieve):
    """One method per stage, or decisions to replay, attached to an LLM with a vision encoder."""

    def __init__(
        self,
        model: Any,
        methods: Sequence[Method],
        replay: Decisions | None,
        positions: Positions,
        processor: Any,
        scope: BudgetScope,
        separators: Separators,
        repair: Repair | None = None,
        reselect: bool = False,
    ) -> None:
        super().__init__(model, methods)
        family = family_of(model)
        _check_stages(family, model, methods)
        by_stage = {method.info.stage: method for method in methods}
        connector, decoder = by_stage.get("connector"), by_stage.get("decoder")
        self.nets = load_nets(model, methods)
        layer_budget = LayerBudget.of(methods, depth_of(model))
        self._reselects = reselect and any(method.reads_question for method in methods)
        if self._reselects and isinstance(decoder, RegisterMethod):
            raise Refusal(f"reselect=True decides anew on the prompt as it was, to which {decoder} has added registers")
        self._family, self._flight = family, InFlight()
        self._images: list[list[ImageReduction]] = []
        self._arguments = list(inspect.signature(type(model).forward).parameters)[1:]
        finders = {
            stage: UserTextFinder(model, processor, getattr(method.needs, "user_text", None) == "all")
            for stage, method in by_stage.items()
            if method.needs.requests("user_text")
        }
        self._connector = Connector(
            family,
            model,
            connector,
            positions,
            finders.get("connector"),
            replay,
            scope,
            separators,
            layer_budget,
            repair,
            self.nets.get("connector"),
            RegisterRows(decoder, self.nets["decoder"]) if isinstance(decoder, RegisterMethod) else None,
            self._reselects,
            decoder is not None and decoder.needs.requests("encoder_states"),
        )
        needs = _with_states(_connector_needs(connector, replay), by_stage)
        self._encoder = EncoderHooks(
            family, model, needs, by_stage.get("encoder"), self._flight, self.nets.get("encoder")
        )
        self._decoder: DecoderHooks | None = None
        self._repair: RepairHooks | None = None
        self._prefusion: Prefusion | None = None
        try:
            if connector is not None and connector.needs.requests("rows_beside"):
                self._encoder.beside = BesideHooks(
                    family, model, methods, connector, self.nets["connector"], self._flight
                )
            if connector is not None and connector.changes_text:
                self._prefusion = Prefusion(model, connector, decoder, self.nets["connector"], self._flight)
            if repair is not None:  # first: probes of the decoder stage call the kernel that they find
                self._repair = RepairHooks(family, model, repair, self._flight)
            if isinstance(decoder, DecoderMethod):
                self._decoder = DecoderHooks(
                    family,
                    model,
                    decoder,
                    positions,
                    finders.get("decoder"),
                    scope,
                    self._flight,
                    layer_budget,
                    repair,
                    self.nets.get("decoder"),
                )
        except Exception:
            for part in (self._encoder, self._repair, self._prefusion):
                if part is not None:
                    part.remove()
            raise
        if self._repair is not None:
            self._repair.install()
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]

    @property
    def entered(self) -> Decisions:
        """`[sample][image]`, the decisions of the stages before the LLM in the latest prefill."""
        return [[image.decision for image in images] for images in self._images]

    @property
    def curves(self) -> list[list[float]]:
        """The curve of each image of the latest prefill, if ``keep`` is an average over the data; for calibration."""
        return self._connector.curves

    @property
    def curve_totals(self) -> list[int]:
        """The number of tokens of each image of :attr:`curves`."""
        return self._connector.curve_totals

    @property
    def sizes(self) -> list[list[Tensor]]:
        """`[sample][image]`, `[K]` float32: the original tokens that each token at the end of the LLM stands for.

        Empty without ``repair``.
        """
        return [[image.sizes for image in images if image.sizes is not None] for images in self._images]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the model run unreduced inside the block: a teacher for its own training. For this thread only."""
        self._flight.paused = True
        try:
            yield
        finally:
            self._flight.paused = False

    @contextmanager
    def with_budget(self, keep: Budget) -> Iterator[None]:
        """Let the method before the LLM keep this many tokens inside the block, in a step of its training."""
        method = self._connector.method
        assert method is not None
        self._connector.method = method.with_budget(keep)
        try:
            yield
        finally:
            self._connector.method = method

    def _compose(self) -> Decisions:
        decisions = [[image.final() for image in images] for images in self._images]
        return decisions if self._prefusion is None else self._prefusion.without_rows(decisions)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for part in (self._encoder, self._decoder, self._repair, self._prefusion):
            if part is not None:
                part.remove()

    # -- the top-level forward ----------------------------------------------------------------------------------------

    # a compiled model runs it as plain Python: what it records must not be traced
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Replace the arguments of a forward: of a prefill with images, or of a step on a reduced cache."""
        if self._flight.paused:
            return None
        kwargs = dict(zip(self._arguments, args, strict=False)) | kwargs
        self._flight.end_forward()
        cache = kwargs.get("past_key_values")
        earlier = info_of(cache)
        if self._encoder.method is not None and shows(kwargs, "video"):
            raise Refusal(f"{self._encoder.method} acts on images in the encoder; videos are not supported")
        if earlier is not None and earlier.layers and self._decoder is None:
            raise Refusal(
                "tokens left this cache inside the LLM: continue with the decoder method attached, and without new "
                "images"
            )
        if earlier is not None and earlier.repaired and self._repair is None:
            raise Refusal("this cache was filled with repaired attention: continue with the same repair attached")
        new_images = any(shows(kwargs, modality) for modality in self._family.modalities)
        if self._reselects:
            check_call(kwargs, new_images)
            if earlier is not None and new_columns(kwargs) > 1:
                return (), self._start_turn(kwargs, earlier, cache)
        if new_images:
            return (), self._start_prefill(kwargs, earlier)
        if before_5_23():
            self._refuse_lost_images(kwargs.get("input_ids"))
        if cache is None or cache.get_seq_length() == 0:
            self._record([], [])  # a prompt without images
        if earlier is None:
            return None
        if self._decoder is not None:
            self._decoder.start_decoding(earlier.layers, kwargs.get("attention_mask"))
        if self._repair is not None:
            self._repair.start_decoding(earlier)
        if self._reselects and earlier.conversation is not None and kwargs.get("input_ids") is not None:
            kwargs, conversation = earlier.conversation.step(kwargs)
            setattr(cache, ATTRIBUTE, replace(earlier, conversation=conversation))
        return (), translate_decode_inputs(kwargs, earlier.entry, cache, self._family.first_position, self.model.dtype)

    def _refuse_lost_images(self, ids: Tensor | None) -> None:
        """Refuse a prompt with placeholders but without images: a chunk of a longer prompt, whose images are lost."""
        if ids is None or ids.shape[1] == 1:  # a decode step
            return
        config = self.model.config
        for modality in self._family.modalities:
            placeholder = getattr(config, f"{modality}_token_id", None)
            if placeholder is not None and bool((ids == placeholder).any()):
                raise Refusal(
                    f"this prompt has {modality} tokens but no {modality}: before 5.23, transformers loses them in "
                    f"prefill chunks (prefill_chunk_size): encode them with the method attached, in one piece"
                )

    def _start_prefill(self, kwargs: dict[str, Any], earlier: CacheInfo | None) -> dict[str, Any]:
        if self._decoder is not None:
            self._decoder.check(kwargs)
        if self._prefusion is not None:
            self._prefusion.check(kwargs)
        prefill = self._flight.prefill = self._connector.prefill(kwargs, earlier)
        if self._decoder is not None:
            self._decoder.start_prefill(prefill)
        if self._repair is not None:
            cache, state = kwargs.get("past_key_values"), self._flight.decoding
            self._repair.start_prefill(prefill.prefix, state, cache is None or not cache.get_seq_length())
        return prefill.kwargs

    def _start_turn(self, kwargs: dict[str, Any], earlier: CacheInfo, cache: Cache) -> dict[str, Any]:
        """Start a prefill of the whole conversation, which refills the cache; it stays as it is until this works."""
        conversation = earlier.conversation
        if conversation is None:
            raise Refusal("this cache was filled without reselect=True: begin a new conversation with it")
        conversation.check(kwargs, cache, str(self))
        columns = new_columns(kwargs)
        kwargs = self._start_prefill({**conversation.continued(kwargs), "past_key_values": DynamicCache()}, None)
        self._flight.turn = RunningTurn(columns, cache, cache.layers)
        cache.layers = emptied(cache)
        if "logits_to_keep" in self._arguments:  # those of earlier turns are not computed
            kwargs["logits_to_keep"] = kwargs.get("logits_to_keep") or columns
        return {**kwargs, "past_key_values": cache}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, model: Any, args: Any, output: Any) -> None:
        """Record the decisions of a prefill, and put the bookkeeping for decode steps on its cache."""
        prefill, state, turn = self._flight.prefill, self._flight.decoding, self._flight.turn
        self._flight.end_forward()
        if turn is not None:
            turn.finish(output)
        if prefill is None or output is None:
            return
        state = state if isinstance(state, PrefillState) else None
        images = (prefill.images if state is None else state.images)[:: prefill.copies]
        self._record(images, self._count_tokens(images, state, prefill.copies))
        parts = output if isinstance(output, tuple) else output.values()  # a tuple with return_dict=False
        cache = next((part for part in parts if isinstance(part, Cache)), None)
        conversation = None if prefill.whole is None else Conversation(str(self), prefill.whole)
        layers = {} if state is None or self._decoder is None else self._decoder.prefixes(state)
        info = CacheInfo(prefill.prefix, layers, conversation)
        # a batch whose longest row lost nothing keeps its width; its padding or positions may have changed all the same
        if cache is not None and (info.layers or info.entry.matters or conversation is not None):
            remember(cache, info)

    def _record(self, images: list[list[ImageReduction]], tokens: list[list[list[int]]]) -> None:
        self._images, self._decisions, self.tokens = images, None, tokens

    def _count_tokens(
        self, rows: list[list[ImageReduction]], state: PrefillState | None, copies: int
    ) -> list[list[list[int]]]:
        """Return the tokens of each image that each layer of the LLM received, `[sample][image][layer]`."""
        depth = depth_of(self.model)
        by_layer = {} if state is None else {layer: counts[::copies] for layer, counts in state.tokens.items()}
        return [
            [
                [by_layer[n][row][number] if n in by_layer else image.decision.slots for n in range(depth)]
                for number, image in enumerate(images)
            ]
            for row, images in enumerate(rows)
        ]


def _check_stages(family: Family, model: Any, methods: Sequence[Method]) -> None:
    """Refuse methods of stages, for videos, or with rows that the family or the model does not support."""
    for method in methods:
        if method.makes_rows and hasattr(model.get_decoder(), "_deepstack_process"):
            raise Refusal(
                f"the net of {method.info.name} makes the rows that enter the LLM, and none for its later layers, "
                f"which {family.title} with deepstack reads, too"
            )
        stage = method.info.stage
        if isinstance(method, PixelMethod):
            if not family.takes_subsets:
                able = "; ".join(able.title for able in families() if able.takes_subsets)
                raise Refusal(
                    f"{method} drops patches before the vision encoder, which is supported in {able}; "
                    f"got {family.title}"
                )
        elif stage not in family.stages:
            reason = f": {family.decoder_unsupported}" if stage == "decoder" else ""
            raise Refusal(f"{method} acts in the {stage}, which is not supported in {family.title}{reason}")
        if method.needs.requests("video") and "video" not in family.modalities:
            raise Refusal(f"{method} reduces videos, which is not supported in {family.title}")


def _connector_needs(method: Method | None, replay: Decisions | None) -> Needs:
    """Return the evidence to read for the connector stage."""
    if replay is not None and not all(decision.projected for row in replay for decision in row):
        return Needs(patches=True)  # these decisions merge the rows that enter the projector
    if method is None:
        return Needs()
    assert isinstance(method.needs, Needs)
    return method.needs


def _with_states(needs: Needs, by_stage: Mapping[Stage, Method]) -> Needs:
    """Return what is read in the vision encoder, with the hidden states that a decoder method reads there."""
    states = getattr(by_stage["decoder"].needs, "encoder_states", None) if "decoder" in by_stage else None
    if states is None:
        return needs
    decoder, encoder, connector = (by_stage.get(stage) for stage in ("decoder", "encoder", "connector"))
    if encoder is not None:
        raise Refusal(f"{decoder} reads hidden states of the vision encoder, in which {encoder} acts")
    if needs.encoder_states is not None:
        raise Refusal(f"{decoder} and {connector} each read hidden states of layers of their own in the vision encoder")
    if connector is not None and connector.makes_rows:
        raise Refusal(
            f"{decoder} reads the vision encoder's state of each token; those that {connector} makes have none"
        )
    return replace(needs, encoder_states=states)
