"""The encode function of a model, wrapped, and hooks on its vision encoder: probes, and the encoder method.

The features keep their number, which ``generate`` checks. The record of the call travels on its output, and the
connector stage acts on it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tokensieve.engine.encoder.before import reduce_before
from tokensieve.engine.encoder.beside import BesideHooks, RowsBeside
from tokensieve.engine.encoder.steps import TowerPass, TowerResult
from tokensieve.engine.encoder.tower import TowerHooks
from tokensieve.engine.handoff import EncoderOutputs
from tokensieve.engine.inflight import InFlight
from tokensieve.engine.probe import Probe, probe_of
from tokensieve.errors import Refusal
from tokensieve.methods import EncoderMethod, EncoderNeeds, Method, Needs, PixelMethod, ResizeMethod
from tokensieve.methods.needs import ReadAttention
from tokensieve.models import EncodeCall, Family, TokenLayout
from tokensieve.models.family import Modality, layer_list, scatter_to_anchors
from tokensieve.models.layout import to_device
from tokensieve.models.planes import rows_of
from tokensieve.models.vit import Pooling
from tokensieve.ops import pixel_hash
from tokensieve.reduction import Reduction
from tokensieve.tokens import resolve_layers

Reads: TypeAlias = dict[str, ReadAttention]
RECEIVED_FOR_CLS = "no [CLS] token in this encoder: attention received from all patches, in layers of global attention"
POOLED_FOR_CLS = "no [CLS] token in this encoder: what its pooling head attends to in the last layer's output"


@dataclass(eq=False)
class RecordedCall(EncodeCall):
    """A running encode call, with the readings and decisions so far.

    Attributes:
        reductions: the decisions of an encoder method.
        projector_input: the rows that entered the projector.
        by_layer: {evidence: {layer: one reading per attention call}}.
        cls_similarity: cosines to [CLS] in the vision encoder's output, in the shape of a reading.
        pooled: {evidence: attention of the pooling head}.
        tower_pass: the running pass through a vision encoder in which tokens leave.
        tower_result: the same, finished.
        beside: the rows of a net beside the layers; ``None``: there are none.
    """

    reductions: list[Reduction] | None = None
    projector_input: Tensor | None = None
    by_layer: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)
    cls_similarity: list[Tensor] = field(default_factory=list)
    pooled: dict[str, Tensor] = field(default_factory=dict)
    tower_pass: TowerPass | None = None
    tower_result: TowerResult | None = None
    beside: RowsBeside | None = None


class EncoderHooks:
    """Records the encode calls of a model, and runs its encoder method.

    Args:
        needs: the evidence that the connector method requests.
        method: the encoder method, if there is one.
        net: the net of a trained method.

    Attributes:
        beside: runs rows of the connector method's net beside the layers; ``None``: there are none.

    Raises:
        Refusal: if the family or the vision encoder lacks something that is needed.
    """

    def __init__(
        self,
        family: Family,
        model: Any,
        needs: Needs,
        method: Method | None,
        flight: InFlight,
        net: nn.Module | None = None,
    ) -> None:
        self.beside: BesideHooks | None = None
        self.family, self.model, self.base, self.flight = family, model, model.base_model, flight
        self.method = method
        self.tower_hooks: TowerHooks | None = None
        if isinstance(method, EncoderMethod):
            self.tower_hooks = TowerHooks(family, model, method, flight, net)
        self.needs = needs
        self.depth, self.cls_replaced = 0, False
        self.pooling: Pooling | None = None
        self.pooled_layers: dict[str, int] = {}  # {evidence: layer whose [CLS] row the pooling head replaces}
        self._probes: list[Probe] = []
        self._handles: list[Any] = []
        reads = needs.patches or needs.cls_similarity or needs.reads_attention or needs.encoder_states is not None
        if family.untested and not reads:
            pass  # nothing is read in an unknown vision encoder: it stays untouched
        elif not family.encoder_unreadable:
            projector = family.projector(model) if needs.patches else None
            for tower in family.towers(model):
                self._hook_tower(tower)
            if projector is not None:
                self._handles.append(projector.register_forward_pre_hook(self._before_projector, with_kwargs=True))
        elif reads:
            raise Refusal(
                f"the evidence of this method in the encoder is unknown in {family.title}: {family.encoder_unreadable}"
            )
        self._own_encode = {}  # an instance attribute that another library had put there
        for modality in family.modalities:
            name = f"get_{modality}_features"
            self._own_encode[name] = vars(self.base).get(name)
            setattr(self.base, name, self._recorded(getattr(self.base, name), modality))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for probe in self._probes:
            probe.remove()
        self._probes.clear()  # they refer to these hooks: with this cycle, a deleted model would keep its memory
        for hooks in (self.tower_hooks, self.beside):
            if hooks is not None:
                hooks.remove()
        for name, attribute in self._own_encode.items():
            delattr(self.base, name)
            if attribute is not None:
                setattr(self.base, name, attribute)

    def _hook_tower(self, tower: nn.Module) -> None:
        attentions, has_cls = self.family.attentions(tower), self.family.has_cls(tower)
        self.depth = len(attentions)
        if self.needs.cls_similarity and not has_cls:
            raise Refusal("this method compares patches with the encoder's [CLS] token; this encoder has none")
        if self.needs.reads_attention and not attentions:
            raise Refusal(f"{type(tower).__name__} has no attention over all patches that could be read")
        if self.needs.encoder_states is not None:  # before any other hook, as this may be refused
            self._hook_states(tower, attentions, resolve_layers(self.needs.encoder_states, self.depth))
        self._tower_arguments = list(inspect.signature(type(tower).forward).parameters)[1:]
        self.pooling = None if has_cls else self.family.pooling_head(tower)
        self.pooled_layers = {} if self.pooling is None else _replaced_by_pooling(self.needs, self.depth)
        from_pooling: dict[str, Any] = dict.fromkeys(self.pooled_layers)
        needs = replace(self.needs, **from_pooling)  # None: the pooling head gives these, so no layer is read for them
        self.cls_replaced = not has_cls and (
            needs.cls_attention is not None or needs.cls_attention_single_head is not None
        )
        for_connector = needs.readers_by_layer(self.depth, has_cls)
        for_encoder: dict[int, Reads] = {}
        if self.tower_hooks is not None and self.tower_hooks.method.needs.reads_attention:
            for_encoder = dict.fromkeys(self.tower_hooks.layers, self.tower_hooks.method.needs.readers(has_cls))
        probes = {
            layer: probe_of(
                attentions[layer],
                partial(self._read, for_connector.get(layer, {}), for_encoder.get(layer, {})),
                self.flight,
            )
            for layer in sorted(for_connector.keys() | for_encoder.keys())
        }
        self._probes += probes.values()
        if self.tower_hooks is not None:
            self.tower_hooks.install()
        self._handles += [
            tower.register_forward_pre_hook(partial(self._before_tower, probes), with_kwargs=True),
            tower.register_forward_hook(partial(self._after_tower, probes)),
        ]

    def _hook_states(self, tower: nn.Module, attentions: list[nn.Module], numbers: list[int]) -> None:
        """Keep the output of layers, each of which is the module around an attention that is numbered so."""
        if self.tower_hooks is not None:
            raise Refusal(f"this method reads hidden states of the encoder, in which {self.tower_hooks.method} acts")
        layer_of = {module: layer for layer in layer_list(tower) for module in layer.modules()}
        if not all(attention in layer_of for attention in attentions):
            raise Refusal(f"the layers of {type(tower).__name__}, whose output this method reads, are unknown")
        for number in dict.fromkeys(numbers):
            hook = partial(self._keep_state, number)
            self._handles.append(layer_of[attentions[number]].register_forward_hook(hook))

    def _keep_state(self, number: int, layer: nn.Module, args: Any, output: Any) -> None:
        call = self._call
        if call is not None:
            rows: Tensor = output[0] if isinstance(output, tuple) else output
            rows = rows if rows.ndim == 3 else rows[None]  # packed images, `[P, C]`
            call.by_layer.setdefault("encoder_states", {}).setdefault(number, []).append(rows)

    def _recorded(self, encode: Callable[..., Any], modality: Modality) -> Callable[..., Any]:
        """Wrap the model's encode function: its output gets the record of the call."""
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            paused = self.flight.paused and self.method is not None
            if self._call is not None or paused:  # the encode function of another modality calls this one
                return encode(*args, **kwargs)
            bound = dict(signature.bind(*args, **kwargs).arguments)
            call = RecordedCall(bound.pop("kwargs", {}) | bound, modality)
            call.beside = None if self.beside is None else RowsBeside()
            self.flight.encoding = call
            try:
                call.output = encode(*args, **kwargs)
            finally:
                self.flight.end_encoding()
            if not isinstance(call.output, tuple):  # with return_dict=False there is no place for a record
                self._outputs(call).attach_to(call.output)
            return call.output

        return recorded

    @property
    def _call(self) -> RecordedCall | None:
        call: RecordedCall | None = self.flight.encoding
        return call

    # -- while the vision encoder runs --------------------------------------------------------------------------------

    def _read(
        self,
        for_connector: Reads,
        for_encoder: Reads,
        query: Tensor,
        key: Tensor,
        scaling: float,
        mask: Tensor | None,
        value: Tensor,
    ) -> dict[str, Tensor]:
        """Read one layer: returns the connector's evidence, and hands the encoder method's to the running pass."""
        call, table = self._call, EncoderNeeds.table()
        if call is not None and call.tower_pass is not None:
            call.tower_pass.evidence = {
                name: read(value, value, 1.0, mask) if table[name].of_values else read(query, key, scaling, mask)
                for name, read in for_encoder.items()
            }
        return {name: read(query, key, scaling, mask) for name, read in for_connector.items()}

    def _before_tower(self, probes: dict[int, Probe], tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        call = self._call
        if call is None:
            return None
        call.encoder_inputs = dict(zip(self._tower_arguments, args, strict=False)) | kwargs
        if isinstance(self.method, ResizeMethod | PixelMethod):
            call.reductions = reduce_before(self.family, self.model, tower, call, self.method)
        if self.tower_hooks is not None:
            grid, features = self.family.tile(self.model, call), call.inputs.get("vision_feature_layer")
            call.tower_pass = self.tower_hooks.start(call.encoder_inputs, grid, features)
        for probe in probes.values():
            probe.arm()
        return (), call.encoder_inputs

    def _before_projector(self, projector: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the projector's input. It runs after the vision encoder (LLaVA) or as its last step (Qwen-VL)."""
        call = self._call
        if call is not None and call.projector_input is None:
            call.projector_input = args[0] if args else next(iter(kwargs.values()))

    def _after_tower(self, probes: dict[int, Probe], tower: nn.Module, args: Any, output: Any) -> None:
        call = self._call
        if call is None:
            return
        for layer, probe in probes.items():
            for reading in probe.take():
                for name, rows in reading.items():
                    call.by_layer.setdefault(name, {}).setdefault(layer, []).append(rows)
        if self.needs.cls_similarity:
            call.cls_similarity.append(_cosine_to_cls(output.last_hidden_state))
        self._read_pooling_head(call, output)
        if self.tower_hooks is not None and call.tower_pass is not None:
            call.tower_result = TowerResult(call.tower_pass, self.tower_hooks.layers_in_all, self.tower_hooks.specials)
            call.reductions = call.tower_result.reductions()
            self.tower_hooks.restore(call.tower_pass, output)
        elif call.reductions is not None and not all(reduction.whole for reduction in call.reductions):
            self.family.restore(tower, output, call.reductions)

    def _read_pooling_head(self, call: RecordedCall, output: Any) -> None:
        """Read the attention of the pooling head to the vision encoder's output."""
        if self.pooling is None or not self.pooled_layers:
            return
        query, key = self.pooling(output.last_hidden_state.detach())
        bias = None if call.tower_pass is None else call.tower_pass.bias
        for name in self.pooled_layers:
            read = Needs.table()[name].read
            assert read is not None
            call.pooled[name] = read(query, key, query.shape[-1] ** -0.5, bias)

    # -- when the encode call returns ---------------------------------------------------------------------------------

    def _outputs(self, call: RecordedCall) -> EncoderOutputs:
        """Convert the readings of a finished call to one row per patch."""
        family, model = self.family, self.model
        device = rows_of(call.output)[0].device
        layouts = [layout.to(device) for layout in family.layouts(model, call)]
        if isinstance(self.method, PixelMethod) and call.reductions is not None:  # the encoder had no rows of the rest
            kept = zip(layouts, call.reductions, strict=True)
            layouts = [layout if decision.whole else TokenLayout(decision.slots) for layout, decision in kept]
        reads_anything = call.by_layer or call.projector_input is not None or call.pooled
        if reads_anything and not all(layout.mapped for layout in layouts):
            raise Refusal(
                f"{family.title} resamples an image of this size after its encoder: rows of the encoder belong to none "
                "of its visual tokens; use a method that reads nothing in the encoder, or smaller images"
            )

        def convert(name: str, layer: int, rows: list[Tensor]) -> list[Tensor]:
            if call.tower_result is not None and call.tower_result.reduced:
                return call.tower_result.to_remaining(name, layer, torch.cat(rows))
            return _per_image(family.to_units(model, call, rows), layouts)

        by_layer = {
            name: {layer: convert(name, layer, rows) for layer, rows in layers.items()}
            for name, layers in call.by_layer.items()
        }
        for name, rows in call.pooled.items():
            by_layer.setdefault(name, {})[self.pooled_layers[name]] = convert(name, self.depth, [rows])
        similarity = convert("cls_similarity", self.depth, call.cls_similarity) if call.cls_similarity else []
        notes = (POOLED_FOR_CLS,) * bool(self.pooled_layers) + (RECEIVED_FOR_CLS,) * self.cls_replaced
        hashes = []
        if self.needs.pixel_hash:
            hashes = [pixel_hash(pixels)[None] for pixels in family.pixels_per_image(call, layouts)]
        patches = self._patches(call, layouts)
        beside = [] if call.beside is None or call.beside.rows is None else list(call.beside.rows)
        return EncoderOutputs(
            layouts, by_layer, patches, similarity, hashes, self.depth, notes, call.reductions, beside
        )

    def _patches(self, call: RecordedCall, layouts: list[TokenLayout]) -> list[Tensor]:
        """Return the rows that entered the projector, `[M, C]` per image; rows of dropped tokens hold zeros."""
        if call.projector_input is None:
            return []
        units = self.family.patches(self.model, call, call.projector_input)
        if call.reductions is None or all(reduction.whole for reduction in call.reductions):
            return _per_image(units, layouts)
        if len(units) == sum(r.total for r in call.reductions):  # the projector ran after the shape was restored
            return list(torch.split(units, [r.total for r in call.reductions]))
        return [
            scatter_to_anchors(rows, r) for rows, r in zip(_per_image(units, layouts), call.reductions, strict=True)
        ]


def _per_image(units: Tensor, layouts: list[TokenLayout]) -> list[Tensor]:
    """Split one row per unit, `[U, ...]`, into one row per patch of each image, `[M, ...]`."""
    if not any(layout.units is not None for layout in layouts):
        return list(torch.split(units, [layout.patches for layout in layouts]))
    return [units[to_device(layout.units, units.device)] for layout in layouts if layout.units is not None]


def _replaced_by_pooling(needs: Needs, depth: int) -> dict[str, int]:
    """Return {[CLS] evidence: its layer} that a pooling head can replace: requested from one layer, of the last two."""
    layer_of = {}
    for name in ("cls_attention", "cls_attention_single_head"):
        layers = getattr(needs, name)
        numbers = [] if layers is None else resolve_layers(layers, depth)
        if len(numbers) == 1 and numbers[0] >= depth - 2:
            layer_of[name] = numbers[0]
    return layer_of


def _cosine_to_cls(rows: Tensor) -> Tensor:
    """Return the cosine of every row to row 0, `[B, n, D]` to `[B, n]`."""
    return torch.cosine_similarity(rows[:, :1].float(), rows.float(), dim=-1)
