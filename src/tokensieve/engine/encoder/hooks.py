"""The encoder stage: what is read from, and changed in, a call that encodes images (inside the tower: ``tower.py``).

``generate()`` encodes images before the first forward and insists on the usual number of features, so nothing is
dropped here: a record of the call travels on its output, and the connector stage acts on it.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from tokensieve.engine import probe as reads
from tokensieve.engine.encoder.tower import Tower, TowerResult
from tokensieve.engine.kernel_probe import probe_of
from tokensieve.engine.probe import Probe, Read
from tokensieve.errors import Refusal
from tokensieve.methods import EncoderMethod, Method, Needs
from tokensieve.methods.baselines import Downsample
from tokensieve.models import EncodeCall, Family, TokenLayout
from tokensieve.models.family import Modality, spread
from tokensieve.models.layout import Grid, to_device
from tokensieve.models.vit import Pooling
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens, resolve_layers

RECORD = "_tokensieve_record"
Reads: TypeAlias = dict[str, Read]
T = TypeVar("T")
RECEIVED = "no [CLS] token in this encoder: attention received from all patches, in layers of global attention"
POOLED = "no [CLS] token in this encoder: what its pooling head attends to in the last layer's output"


@dataclass(frozen=True)
class EncoderOutputs:
    """What one encode call told about its images, in their order. Rows are those of patches, `[M, ...]` per image.

    Attributes:
        shapes: how the visual tokens that the encoder made lie.
        read: what the probes read, as `[evidence][layer][image]`.
        patches: per image `[M, C]`, the rows that entered the projector, if a method needs them.
        similar: `[M]` per image, cosine to [CLS] in what the tower puts out, where a method asks for it.
        depth: number of encoder layers that can be probed.
        notes: remarks on the evidence.
        reductions: what an encoder method did per image; the dropped slots hold zeros.
    """

    shapes: list[TokenLayout]
    read: dict[str, dict[int, list[Tensor]]]
    patches: list[Tensor]
    similar: list[Tensor]
    depth: int
    notes: tuple[str, ...]
    reductions: list[Reduction] | None

    def of(self, images: Sequence[int]) -> EncoderOutputs:
        """The record of these images, in this order; one may stand there twice."""

        def pick(per_image: list[T]) -> list[T]:
            return [per_image[image] for image in images] if per_image else per_image

        return self._with(pick, pick, pick)

    def beside(self, other: EncoderOutputs) -> EncoderOutputs:
        """The record of these images, and then those of another call."""

        def both(name: str) -> Any:
            mine, theirs = getattr(self, name), getattr(other, name)
            return mine and theirs and [*mine, *theirs]

        read = {
            name: {layer: [*rows, *other.read[name][layer]] for layer, rows in layers.items()}
            for name, layers in self.read.items()
        }
        lists = {name: both(name) for name in ("shapes", "patches", "similar", "reductions")}
        return replace(self, read=read, **lists)

    def joined(self, groups: Sequence[Sequence[int]]) -> EncoderOutputs:
        """The record of images that are several entries each: the views of a group, one after another."""

        def join(rows: list[Tensor]) -> list[Tensor]:
            return [torch.cat([rows[i] for i in group]) for group in groups] if rows else rows

        def shape(shapes: list[TokenLayout]) -> list[TokenLayout]:
            views = [[view for i in group for view in shapes[i].views] for group in groups]
            return [TokenLayout(sum(map(prod, each)), tuple(each)) for each in views]

        return self._with(shape, join, lambda reductions: reductions)

    def _with(
        self,
        shapes: Callable[[list[TokenLayout]], list[TokenLayout]],
        rows: Callable[[list[Tensor]], list[Tensor]],
        reductions: Callable[[list[Reduction]], list[Reduction]],
    ) -> EncoderOutputs:
        return replace(
            self,
            shapes=shapes(self.shapes),
            read={name: {layer: rows(each) for layer, each in layers.items()} for name, layers in self.read.items()},
            patches=rows(self.patches),
            similar=rows(self.similar),
            reductions=self.reductions and reductions(self.reductions),
        )


@dataclass(eq=False)
class RecordedCall(EncodeCall):
    """An encode call on its way, with what was read and decided in it.

    Attributes:
        reductions: an encoder method's decisions.
        rows: what entered the projector.
        reads: `[evidence][layer]`, what the probes read, attention call by call.
        similar: cosines to [CLS] in what the tower puts out, as a probe would read them.
        arrived: what left a tower in which tokens leave.
        pooled: `[evidence]`, what a pooling head attends to.
    """

    reductions: list[Reduction] | None = None
    rows: list[Tensor] = field(default_factory=list)
    reads: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)
    similar: list[Tensor] = field(default_factory=list)
    arrived: TowerResult | None = None
    pooled: dict[str, Tensor] = field(default_factory=dict)


class EncoderHooks:
    """The encode function of a model, wrapped, and hooks on its tower: probes, and what encoder methods do.

    Raises:
        ValueError: if the family or the tower lacks something that is needed.
    """

    def __init__(self, family: Family, model: Any, needs: Needs, method: Method | None) -> None:
        if needs.joint:
            raise Refusal(
                f"{family.title} checkpoints hold no text encoder of the vision tower's space; cdpruner(space='llm') "
                "compares in the LLM's input space"
            )
        self.family, self.model, self.base, self.method = family, model, model.base_model, method
        self.inside = Tower(family, model, method) if isinstance(method, EncoderMethod) else None
        self.downsample = method if isinstance(method, Downsample) else None
        self.similarity = needs.cls_similarity
        self._local = threading.local()
        self.probes: list[Probe] = []
        self._handles: list[Any] = []
        self.depth, self.substitute = 0, False
        self.pooling: Pooling | None = None
        self.pooled: dict[str, int] = {}  # evidence, and the layer whose [CLS] row the pooling head's stands in for
        if family.opaque:
            if needs.reads_encoder:
                raise Refusal(f"what this method reads in the encoder is unknown in {family.title}: {family.opaque}")
        else:
            projector = family.projector(model) if needs.patches else None
            for tower in family.towers(model):
                self._hook_tower(tower, needs)
            if projector is not None:
                self._handles.append(projector.register_forward_pre_hook(self._projecting, with_kwargs=True))
        self._own = {}  # somebody else may have wrapped these, too
        for modality in family.modalities:
            name = f"get_{modality}_features"
            self._own[name] = vars(self.base).get(name)
            setattr(self.base, name, self._recorded(getattr(self.base, name), modality))

    def _hook_tower(self, tower: nn.Module, needs: Needs) -> None:
        attentions, cls = self.family.attentions(tower), self.family.has_cls(tower)
        self.depth = len(attentions)
        if self.similarity and not cls:
            raise Refusal("this method compares patches with the encoder's [CLS] token; this encoder has none")
        self._names = list(inspect.signature(type(tower).forward).parameters)[1:]
        if needs.reads_attention and not attentions:
            raise Refusal(f"{type(tower).__name__} has no attention over all patches that could be read")
        self.pooling = None if cls else self.family.pooling_head(tower)
        self.pooled = {} if self.pooling is None else _last_alone(needs, self.depth)
        nothing: dict[str, Any] = dict.fromkeys(self.pooled)
        needs = replace(needs, **nothing)
        asked = _asked(needs, self.depth, cls)
        self.substitute = not cls and (needs.cls_attention is not None or needs.cls_wide is not None)
        own = {} if self.inside is None else self._asked_inside(self.inside, cls)
        probes = {
            layer: probe_of(attentions[layer], partial(self._read, asked.get(layer, {}), own.get(layer, {})))
            for layer in sorted(asked.keys() | own.keys())
        }
        self.probes += probes.values()
        if self.inside is not None:
            self.inside.install()
        self._handles += [
            tower.register_forward_pre_hook(partial(self._before, probes), with_kwargs=True),
            tower.register_forward_hook(partial(self._after, probes)),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for probe in self.probes:
            probe.remove()
        if self.inside is not None:
            self.inside.remove()
        for name, own in self._own.items():
            delattr(self.base, name)
            if own is not None:
                setattr(self.base, name, own)

    def _recorded(self, encode: Callable[..., Any], modality: Modality) -> Callable[..., Any]:
        """The model's encode function, laying a record on what it returns."""
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._current is not None:  # one that the encode function of another modality calls
                return encode(*args, **kwargs)
            bound = dict(signature.bind(*args, **kwargs).arguments)
            call = RecordedCall(bound.pop("kwargs", {}) | bound, modality)
            self._local.call = call
            try:
                call.output = encode(*args, **kwargs)
            finally:
                self._local.call = None
                for probe in self.probes:  # a call that failed inside the tower leaves them armed
                    probe.take()
                if self.inside is not None:
                    self.inside.stop()
            if not isinstance(call.output, tuple):  # return_dict=False: nobody can act on it
                setattr(call.output, RECORD, self._record(call))
            return call.output

        return recorded

    @property
    def _current(self) -> RecordedCall | None:
        call: RecordedCall | None = getattr(self._local, "call", None)
        return call

    # -- while the tower runs -----------------------------------------------------------------------------------------

    @staticmethod
    def _asked_inside(tower: Tower, cls: bool) -> dict[int, Reads]:
        """What a method inside the tower wants to know in its own layers."""
        asked = {stage: _asked(tower.method.needs, stage + 1, cls).get(stage, {}) for stage in tower.stages}
        return {stage: reads for stage, reads in asked.items() if reads}

    def _read(
        self, asked: Reads, own: Reads, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None
    ) -> dict[str, Tensor]:
        """What the connector stage asked of a layer; what a stage inside the tower asked is handed to it at once."""
        if self.inside is not None:
            self.inside.see({name: read(query, key, scaling, mask) for name, read in own.items()})
        return {name: read(query, key, scaling, mask) for name, read in asked.items()}

    def _before(self, probes: dict[int, Probe], tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        call = self._current
        if call is None:
            return None
        call.tower = dict(zip(self._names, args, strict=False)) | kwargs
        if self.downsample is not None:
            self._resize(tower, call, self.downsample)
        if self.inside is not None:
            pixels = call.tower["pixel_values"]
            self.inside.start(call.tower, [self.family.tile(self.model, call)] * len(pixels), pixels.device)
        for probe in probes.values():
            probe.arm()
        return (), call.tower

    def _projecting(self, projector: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep what enters the projector after the tower (LLaVA) or as its last step (Qwen-VL)."""
        call = self._current
        if call is not None and not call.rows:
            call.rows.append(args[0] if args else next(iter(kwargs.values())))

    def _resize(self, tower: nn.Module, call: RecordedCall, method: Downsample) -> None:
        device = next(given.device for given in call.tower.values() if isinstance(given, Tensor))
        grids = [shape.grid or (1, shape.total) for shape in self.family.shapes(self.model, call)]
        images = [VisualTokens(torch.empty(1, h * w, 0, device=device), grid=(h, w)) for h, w in grids]
        call.reductions = reductions = [method(image)[0] for image in images]
        if not all(reduction.whole for reduction in reductions):
            pairs = zip(grids, images, reductions, strict=True)
            cells = [grid if reduction.whole else method.cells(image) for grid, image, reduction in pairs]
            call.tower = self.family.resize(tower, call.tower, cells)

    def _after(self, probes: dict[int, Probe], tower: nn.Module, args: Any, output: Any) -> None:
        call = self._current
        if call is None:
            return
        for layer, probe in probes.items():
            for read in probe.take():
                for name, rows in read.items():
                    call.reads.setdefault(name, {}).setdefault(layer, []).append(rows)
        if self.similarity:
            call.similar.append(_to_cls(output.last_hidden_state))
        if self.inside is not None:
            call.arrived = self.inside.finish()
            call.reductions = call.arrived.reductions()
        self._pool(call, output)
        if self.inside is not None and call.arrived is not None:
            self.inside.restore(call.arrived.passage, output)
        elif call.reductions is not None and not all(reduction.whole for reduction in call.reductions):
            self.family.restore(tower, output, call.reductions)

    def _pool(self, call: RecordedCall, output: Any) -> None:
        """Read what the pooling head attends to, in the rows that left the tower."""
        if self.pooling is None or not self.pooled:
            return
        query, key = self.pooling(output.last_hidden_state.detach())
        bias = None if call.arrived is None else call.arrived.passage.bias
        for name in self.pooled:
            read = reads.attention_from_cls if name == "cls_attention" else reads.attention_from_cls_wide
            call.pooled[name] = read(query, key, query.shape[-1] ** -0.5, bias)

    # -- when the call returns ----------------------------------------------------------------------------------------

    def _record(self, call: RecordedCall) -> EncoderOutputs:
        family, model = self.family, self.model
        device = call.output.pooler_output[0].device
        shapes = [shape.to(device) for shape in family.shapes(model, call)]
        if (call.reads or call.rows or call.pooled) and not all(shape.mapped for shape in shapes):
            raise Refusal(
                f"{family.title} resamples an image of this size after its encoder: what is read there belongs to none "
                "of its visual tokens; use a method that reads nothing in the encoder, or smaller images"
            )

        def per_image(units: Tensor) -> list[Tensor]:
            if not any(shape.units is not None for shape in shapes):
                return list(torch.split(units, [shape.patches for shape in shapes]))
            return [units[to_device(shape.units, units.device)] for shape in shapes if shape.units is not None]

        def told(name: str, layer: int, rows: list[Tensor]) -> list[Tensor]:
            if call.arrived is not None and call.arrived.short:
                return call.arrived.lift(name, layer, torch.cat(rows))
            return per_image(family.read(model, call, rows))

        read = {
            name: {layer: told(name, layer, rows) for layer, rows in layers.items()}
            for name, layers in call.reads.items()
        }
        for name, rows in call.pooled.items():
            read.setdefault(name, {})[self.pooled[name]] = told(name, self.depth, [rows])
        patches = self._patches(call, per_image) if call.rows else []
        similar = told("cls_similarity", self.depth, call.similar) if call.similar else []
        notes = (POOLED,) * bool(self.pooled) + (RECEIVED,) * self.substitute
        return EncoderOutputs(shapes, read, patches, similar, self.depth, notes, call.reductions)

    def _patches(self, call: RecordedCall, per_image: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """The rows that entered the projector, `[M, C]` per image; slots that an encoder method dropped hold zeros."""
        units = self.family.patches(self.model, call, call.rows[0])
        if call.reductions is None or all(reduction.whole for reduction in call.reductions):
            return per_image(units)
        if len(units) == sum(r.total for r in call.reductions):  # the projector comes after the tower, and restoring
            return list(torch.split(units, [r.total for r in call.reductions]))
        return [spread(rows, r) for rows, r in zip(per_image(units), call.reductions, strict=True)]


def _last_alone(needs: Needs, depth: int) -> dict[str, int]:
    """What of [CLS] is wanted of a single layer, the last but one or the last; and that layer."""
    found = {}
    for name, layers in (("cls_attention", needs.cls_attention), ("cls_wide", needs.cls_wide)):
        wanted = [] if layers is None else resolve_layers(layers, depth)
        if len(wanted) == 1 and wanted[0] >= depth - 2:
            found[name] = wanted[0]
    return found


def _asked(needs: Needs, depth: int, cls: bool) -> dict[int, Reads]:
    """What to read in which layer."""
    wanted = (
        ("cls_attention", needs.cls_attention, reads.attention_from_cls if cls else reads.attention_received),
        ("cls_wide", needs.cls_wide, reads.attention_from_cls_wide if cls else reads.attention_received_wide),
        ("received", needs.received, reads.attention_received),
        ("encoder_keys", needs.encoder_keys, reads.keys),
    )
    asked: dict[int, Reads] = {}
    for name, layers, read in wanted:
        for layer in [] if layers is None else resolve_layers(layers, depth):
            asked.setdefault(layer, {})[name] = read
    return asked


def _to_cls(rows: Tensor) -> Tensor:
    """Cosine of every row to row 0, `[B, n, D]` to `[B, n]`."""
    return torch.cosine_similarity(rows[:, :1].float(), rows.float(), dim=-1)


def evidence(
    record: EncoderOutputs,
    parts: list[tuple[int, slice]],
    features: Tensor,
    patches: Tensor | None,
    text: Tensor | None,
    text_mask: Tensor | None,
    grid: Grid | None,
    frames: int | None = None,
) -> VisualTokens:
    """The visual tokens `[B, N, D]` of equal ``parts`` (image, which of its patches) with what the record holds."""
    tokens = VisualTokens(
        features,
        grid=grid,
        frames=frames,
        patches=patches,
        depth=record.depth,
        text=text,
        text_mask=text_mask,
        notes=record.notes,
    )
    read: dict[str, Any] = {
        name: {layer: torch.stack([rows[image][where] for image, where in parts]) for layer, rows in layers.items()}
        for name, layers in record.read.items()
    }
    if record.similar:
        read["cls_similarity"] = torch.stack([record.similar[image][where] for image, where in parts])
    return replace(tokens, **read)
