"""``attach``: install the hooks of a method on a live model, and the handle that removes them."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tokensieve.engine.cache import CacheInfo, remember, states_of, translate_decode_inputs
from tokensieve.engine.connector.decide import Scope, check_scope
from tokensieve.engine.connector.prefill import PIXELS, Connector, Decisions, ImageReduction, Prefill
from tokensieve.engine.decoder.hooks import DecoderHooks
from tokensieve.engine.decoder.sequence import PrefillState
from tokensieve.engine.encoder.hooks import EncoderHooks
from tokensieve.engine.fusion.families import is_fusion
from tokensieve.engine.prompt.user_text import UserTextFinder
from tokensieve.engine.versions import warn_if_untested
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, EncoderMethod, Method, Needs, Positions, parse
from tokensieve.methods.baselines import Downsample
from tokensieve.models import family_of
from tokensieve.models.family import Modality
from tokensieve.reduction import Reduction

LEFT_INSIDE = "tokens left this cache inside the LLM: continue with the decoder method attached, and without new images"
STAGES = ("encoder", "connector", "decoder")
KINDS: dict[str, tuple[type[Method], ...]] = {"encoder": (EncoderMethod, Downsample), "decoder": (DecoderMethod,)}
_attached: weakref.WeakValueDictionary[int, Sieve] = weakref.WeakValueDictionary()  # by id; the hooks keep it alive
_lock = threading.Lock()


def attach(
    model: Any,
    method: str | Method | Sequence[Method] | Decisions,
    *,
    positions: Positions = "original",
    processor: Any = None,
    budget_scope: Scope = "image",
    **parameters: Any,
) -> Sieve:
    """Make every later call of ``model`` drop visual tokens: ``generate`` and ``forward``, any batch.

    Only hooks are installed; weights, config and processor stay untouched, and ``detach()`` leaves no trace.

    Args:
        model: a Hugging Face vision-language model of a family in ``tokensieve.models``; for a fusion method such as
            ``pumer`` a ViLT, BridgeTower or :mod:`METER <tokensieve.fusion.meter>` with any head on pooled tokens.
        method: a spec such as ``"vtc-cls"`` or ``"vtc-cls(keep=64)"``, a method object, a list of them (one per
            stage), or decisions `[sample][image]` as in ``sieve.last``, which are then replayed as they are, where
            tokens enter the LLM: also those of methods inside of it or of the tower, whose own run is another.
        positions: "original": survivors keep their position ids; "contiguous": they are renumbered, as most official
            codes do, at the cost of grounding.
        processor: the model's processor; tells the user's words from the chat template for text-informed methods.
        budget_scope: what ``keep`` is for: each "image" or video ("clip" says the same); all of a "sample" together,
            shared out by size, or as "sample-score" by how many of the best tokens of all each holds; each "tile" of an
            image that the encoder sees in tiles; or each "frame" of a video, then the method sees frame by frame.
        parameters: values for parameters of a spec, e.g. ``keep=64``.

    Raises:
        ValueError: unknown method or parameter, a model of unknown family, something the model cannot give, or a
            model that has a method attached already.
    """
    if positions not in ("original", "contiguous"):
        raise Refusal(f"positions must be 'original' or 'contiguous'; got {positions!r}")
    warn_if_untested()
    stages, replay = _read(method, parameters)
    check_scope(budget_scope, stages)
    with _lock:
        if id(model) in _attached:
            raise Refusal(f"{_attached[id(model)]} is attached to this model already; detach() it first")
        sieve = _kind(model, stages)(model, stages, replay, positions, processor, budget_scope)
        _attached[id(model)] = sieve
    return sieve


class Sieve:
    """An attached method. Use as a context manager, or call :meth:`detach`.

    Attributes:
        tokens: `[sample][image]`, how many of its tokens each block of the LLM saw in that prefill.
    """

    def __init__(
        self,
        model: Any,
        stages: list[Method],
        replay: Decisions | None,
        positions: Positions,
        processor: Any,
        scope: Scope = "image",
    ) -> None:
        family = family_of(model)
        for stage in stages:
            if stage.info.stage not in family.stages:
                because = f": {family.excluded}" if stage.info.stage == "decoder" else ""
                raise Refusal(
                    f"{stage} acts in the {stage.info.stage}, which is not supported in {family.title}{because}"
                )
            kinds = KINDS.get(stage.info.stage, (Method,))
            if not isinstance(stage, kinds):
                raise Refusal(f"{stage.info.name} must be a {kinds[0].__name__} to act in the {stage.info.stage}")
            if stage.needs.video and "video" not in family.modalities:
                raise Refusal(f"{stage} reduces videos, which is not supported in {family.title}")
        by_stage = {stage.info.stage: stage for stage in stages}
        encoder, connector = by_stage.get("encoder"), by_stage.get("connector")
        decoder = by_stage.get("decoder")
        needs = connector.needs if connector is not None else Needs()
        if replay is not None and not all(decision.projected for row in replay for decision in row):
            needs = Needs(patches=True)
        self.model, self.stages, self.positions = model, stages, positions
        self._last: list[list[ImageReduction]] = []
        self._decisions: Decisions | None = None
        self.tokens: list[list[list[int]]] = []
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._local = threading.local()
        words = UserTextFinder(model, processor) if any(stage.needs.text for stage in stages) else None
        asked = words if needs.text else None
        self._connector = Connector(family, model, connector, positions, asked, replay, scope)
        self._encoder = EncoderHooks(family, model, needs, encoder)
        self._decoder: DecoderHooks | None = None
        if isinstance(decoder, DecoderMethod):
            said = words if decoder.needs.text else None
            try:
                self._decoder = DecoderHooks(family, model, decoder, positions, said, scope)
            except Exception:
                self._encoder.remove()
                raise
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def last(self) -> Decisions:
        """`[sample][image]`, the Reduction of each image or video in the latest prefill, all stages as one."""
        if self._decisions is None:  # composed when somebody looks, not in the prefill
            self._decisions = [[plan.final() for plan in row] for row in self._last]
        return self._decisions

    def _note(self, plans: list[list[ImageReduction]], tokens: list[list[list[int]]]) -> None:
        self._last, self._decisions, self.tokens = plans, None, tokens

    def detach(self) -> None:
        """Remove every hook: the model is what it was before. Does nothing the second time."""
        with _lock:
            if _attached.get(id(self.model)) is not self:
                return
            del _attached[id(self.model)]
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._encoder.remove()
        if self._decoder is not None:
            self._decoder.remove()

    def __enter__(self) -> Sieve:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __str__(self) -> str:
        return " + ".join(map(str, self.stages)) or "a replay"

    def __reduce__(self) -> Any:
        """Copying or pickling an attached model comes here: hooks belong to one model."""
        raise Refusal(f"{self} is attached to this model; detach() it first: hooks cannot be copied")

    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        self._local.prefill = None
        cache = kwargs.get("past_key_values")
        states = states_of(cache)
        if self._encoder.method is not None and _shows(kwargs, "video"):
            raise Refusal(f"{self._encoder.method} acts on images in the encoder; videos are not supported")
        if any(_shows(kwargs, modality) for modality in self._encoder.family.modalities):
            if self._decoder is not None:
                self._decoder.check(kwargs)
            elif states is not None and states.blocks:
                raise Refusal(LEFT_INSIDE)
            prefill: Prefill = self._connector.prefill(kwargs, states)
            self._local.prefill = prefill
            if self._decoder is not None:
                self._decoder.start(prefill)
            return (), prefill.kwargs
        if cache is None or cache.get_seq_length() == 0:
            self._note([], [])  # a prompt that shows nothing
        if states is None:
            return None
        if self._decoder is not None:
            self._decoder.resume(states.blocks, kwargs.get("attention_mask"))
        elif states.blocks:
            raise Refusal(LEFT_INSIDE)
        return (), translate_decode_inputs(kwargs, states.entry, cache, self._encoder.family.first_position)

    def _after(self, model: Any, args: Any, output: Any) -> None:
        prefill, self._local.prefill = self._local.prefill, None
        run = self._decoder.finish() if self._decoder is not None else None
        if prefill is None or output is None:
            return
        plans = (prefill.plans if run is None else run.plans)[:: prefill.copies]
        self._note(plans, self._tokens(plans, run, prefill.copies))
        cache = getattr(output, "past_key_values", None)
        states = CacheInfo(prefill.state, {} if run is None else run.states)
        # a batch whose longest row lost nothing is as wide as before: then only its padding or positions tell
        if cache is not None and (states.blocks or states.entry.matters):
            remember(cache, states)

    def _tokens(
        self, entered: list[list[ImageReduction]], run: PrefillState | None, copies: int
    ) -> list[list[list[int]]]:
        layers = getattr(self.model.get_decoder(), "layers", None)
        blocks = range(self.model.config.get_text_config().num_hidden_layers if layers is None else len(layers))
        inside = {} if run is None else {block: rows[::copies] for block, rows in run.tokens.items()}
        return [
            [
                [inside[b][row][image] if b in inside else plan.decision.slots for b in blocks]
                for image, plan in enumerate(plans)
            ]
            for row, plans in enumerate(entered)
        ]


def _kind(model: Any, stages: list[Method]) -> type[Sieve]:
    """LLMs with a vision tower, or cross-modal encoders; ``full`` goes with either."""
    from tokensieve.engine.fusion.handle import FusionSieve

    fusing = any(stage.info.stage == "fusion" for stage in stages)
    unreduced = is_fusion(model) and [stage.info.name for stage in stages] == ["full"]
    return FusionSieve if fusing or unreduced else Sieve


def _shows(kwargs: dict[str, Any], modality: Modality) -> bool:
    """Whether a forward gets images (or videos), encoded or not."""
    encoded = kwargs.get("mm_encoder_outputs") or {}
    return encoded.get(modality) is not None or any(kwargs.get(name) is not None for name in PIXELS[modality])


def _all(items: Any, kind: type) -> bool:
    """Whether these are some, and all of one kind."""
    return isinstance(items, Sequence) and len(items) > 0 and all(isinstance(item, kind) for item in items)


def _read(
    method: str | Method | Sequence[Method] | Decisions, parameters: dict[str, Any]
) -> tuple[list[Method], Decisions | None]:
    """The stages, or the decisions to replay."""
    if isinstance(method, str):
        stages = parse(method, **parameters)
    elif parameters:
        raise Refusal(f"{', '.join(parameters)} can only be given with a method's name; got {method!r}")
    elif isinstance(method, Method):
        stages = [method]
    elif _all(method, Method):
        stages = list(method)  # type: ignore[arg-type]
    elif _all(method, list) and all(not row or _all(row, Reduction) for row in method):
        return [], [list(row) for row in method]  # type: ignore[arg-type]
    else:
        raise Refusal(
            "a method is a spec such as 'vtc-cls(keep=64)', a Method, a list of Methods, or decisions [sample][image]; "
            f"got {method!r}"
        )
    order = [stage.info.stage for stage in stages]
    if len(set(order)) < len(order):
        raise Refusal(f"two methods of the same stage cannot be combined; got {', '.join(order)}")
    if "fusion" in order and len(order) > 1:
        raise Refusal(f"a fusion method acts alone; got {', '.join(order)}")
    if "fusion" not in order and order != sorted(order, key=STAGES.index):
        raise Refusal(f"stages must stand in the order {', '.join(STAGES)}; got {', '.join(order)}")
    return stages, None
