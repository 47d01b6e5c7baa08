"""The encoder stage: what is read from, and changed in, a call of the vision tower (inside it: ``tower.py``).

``generate()`` encodes images before the first forward and insists on the usual number of features, so nothing is
dropped here: a record of the call travels on the tower's output, and the connector stage acts on it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from tokensieve.attach import probe as reads
from tokensieve.attach.probe import Probe
from tokensieve.attach.tower import Arrived, Tower
from tokensieve.methods import EncoderMethod, Method, Needs
from tokensieve.methods.baselines import Downsample
from tokensieve.models import Family
from tokensieve.models.family import spread
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens, resolve_layers

RECORD = "_tokensieve_record"
Reads: TypeAlias = dict[str, Callable[[Tensor, Tensor, float, Tensor | None], Tensor]]
T = TypeVar("T")
RECEIVED = "no [CLS] token in this encoder: attention received from all patches, in layers of global attention"


@dataclass(frozen=True)
class Record:
    """What one tower call told about its images, in their order.

    Attributes:
        grids: (height, width) in the visual tokens that the tower made.
        read: what the probes read, as `[evidence][layer][image]`, rows `[N, ...]`.
        patches: per image `[N, C]`, the rows that entered the projector, if a method needs them.
        similar: `[N]` per image, cosine to [CLS] in what the tower puts out, where a method asks for it.
        depth: number of encoder layers that can be probed.
        notes: remarks on the evidence.
        reductions: what an encoder method did per image; the dropped slots hold zeros.
    """

    grids: list[tuple[int, int]]
    read: dict[str, dict[int, list[Tensor]]]
    patches: list[Tensor]
    similar: list[Tensor]
    depth: int
    notes: tuple[str, ...]
    reductions: list[Reduction] | None

    def of(self, images: Sequence[int]) -> Record:
        """The record of these images, in this order; one may stand there twice."""

        def pick(per_image: list[T]) -> list[T]:
            return [per_image[image] for image in images] if per_image else per_image

        return replace(
            self,
            grids=pick(self.grids),
            read={name: {layer: pick(rows) for layer, rows in layers.items()} for name, layers in self.read.items()},
            patches=pick(self.patches),
            similar=pick(self.similar),
            reductions=self.reductions and pick(self.reductions),
        )


class EncoderHooks:
    """Hooks on one vision tower: probes, the resizing of ``downsample``, and those inside the tower.

    Raises:
        ValueError: if the tower lacks a layer or the [CLS] token that is needed.
    """

    def __init__(self, family: Family, model: Any, needs: Needs, method: Method | None) -> None:
        if needs.joint:
            raise ValueError(
                f"{family.title} checkpoints hold no text encoder of the vision tower's space; cdpruner(space='llm') "
                "compares in the LLM's input space"
            )
        self.family, self.tower = family, family.tower(model)
        self.method = method
        self.downsample = method if isinstance(method, Downsample) else None
        self._names = list(inspect.signature(type(self.tower).forward).parameters)[1:]
        self._local = threading.local()
        attentions = family.attentions(self.tower)
        self.depth, self.cls = len(attentions), family.has_cls(self.tower)
        self.similarity = needs.cls_similarity
        if self.similarity and not self.cls:
            raise ValueError("this method compares patches with the encoder's [CLS] token; this encoder has none")
        asked = _asked(needs, self.depth, self.cls)
        self.substitute = not self.cls and (needs.cls_attention is not None or needs.cls_wide is not None)
        self.inside = Tower(family, model, method) if isinstance(method, EncoderMethod) else None
        own: dict[int, Reads] = {}
        if self.inside is not None and method is not None:
            own = {stage: _asked(method.needs, stage + 1, self.cls).get(stage, {}) for stage in self.inside.stages}
        self.asked = asked
        self.probes = {
            layer: Probe(attentions[layer], partial(self._read, asked.get(layer, {}), own.get(layer, {})))
            for layer in sorted({*asked, *(stage for stage, reads in own.items() if reads)})
        }
        self._handles = [
            self.tower.register_forward_pre_hook(self._before, with_kwargs=True),
            self.tower.register_forward_hook(self._after),
        ]
        if needs.patches:
            projector = family.projector(model)
            self._handles.append(projector.register_forward_pre_hook(self._projecting, with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for probe in self.probes.values():
            probe.remove()
        if self.inside is not None:
            self.inside.remove()

    def _read(self, asked: Reads, own: Reads, query: Tensor, key: Tensor, scaling: float) -> dict[str, Tensor]:
        """What the connector stage asked of a layer; what a stage inside the tower asked is handed to it at once."""
        passage = None if self.inside is None else self.inside.passage
        bias = None if passage is None else passage.bias
        if passage is not None:
            passage.seen = {name: read(query, key, scaling, bias) for name, read in own.items()}
        return {name: read(query, key, scaling, bias) for name, read in asked.items()}

    def _before(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        grids = self.family.grids(tower, inputs)
        reductions = None
        if self.downsample is not None:
            inputs, reductions = self._resize(inputs, grids)
        if self.inside is not None:
            self.inside.start(inputs, grids, next(tower.parameters()).device)
        self._local.call = Call(inputs, reductions, [])
        for probe in self.probes.values():
            probe.arm()
        return (), inputs

    def _projecting(self, projector: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep what enters the projector after the tower (LLaVA) or as its last step (Qwen-VL)."""
        call: Call | None = getattr(self._local, "call", None)
        if call is not None and not call.patches:
            rows = args[0] if args else next(iter(kwargs.values()))
            call.patches.extend(self.family.patches(self.tower, call.inputs, rows))

    def _resize(self, inputs: dict[str, Any], grids: list[tuple[int, int]]) -> tuple[dict[str, Any], list[Reduction]]:
        method, device = self.downsample, next(self.tower.parameters()).device
        assert method is not None
        images = [VisualTokens(torch.empty(1, h * w, 0, device=device), grid=(h, w)) for h, w in grids]
        reductions = [method(image)[0] for image in images]
        if all(reduction.whole for reduction in reductions):
            return inputs, reductions
        cells = [image.grid if r.whole else method.cells(image) for image, r in zip(images, reductions, strict=True)]
        return self.family.resize(self.tower, inputs, [cell for cell in cells if cell is not None]), reductions

    def _after(self, tower: nn.Module, args: Any, output: Any) -> None:
        call: Call = self._local.call
        inputs, reductions = call.inputs, call.reductions
        grids = self.family.grids(tower, inputs)
        arrived = None if self.inside is None else self.inside.finish()
        read: dict[str, dict[int, list[Tensor]]] = {}
        for layer, probe in self.probes.items():
            rows = probe.take()
            for name in self.asked.get(layer, {}):
                read.setdefault(name, {})[layer] = self._per_token(
                    inputs, arrived, name, layer, [r[name] for r in rows]
                )
        similar = []
        if self.similarity:
            to_cls = [_to_cls(output.last_hidden_state)]
            similar = self._per_token(inputs, arrived, "cls_similarity", self.depth, to_cls)
        if self.inside is not None and arrived is not None:
            reductions = arrived.reductions()
            self.inside.restore(arrived.passage, output)
        elif reductions is not None and not all(reduction.whole for reduction in reductions):
            self.family.restore(tower, output, reductions)
            call.patches[:] = [spread(rows, r) for rows, r in zip(call.patches, reductions, strict=False)]
        notes = (RECEIVED,) if self.substitute else ()
        setattr(output, RECORD, Record(grids, read, call.patches, similar, self.depth, notes, reductions))

    def _per_token(
        self, inputs: dict[str, Any], arrived: Arrived | None, name: str, layer: int, rows: list[Tensor]
    ) -> list[Tensor]:
        """What was read in a layer (or of what the tower puts out), per image in terms of the tokens that are left."""
        if arrived is not None and arrived.short:
            return arrived.lift(name, layer, torch.cat(rows))
        return self.family.per_token(self.tower, inputs, rows)


@dataclass(frozen=True)
class Call:
    """A tower call on its way: its inputs, an encoder method's decisions, and the rows that enter the projector."""

    inputs: dict[str, Any]
    reductions: list[Reduction] | None
    patches: list[Tensor]


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
    record: Record,
    images: list[int],
    features: Tensor,
    patches: Tensor | None,
    text: Tensor | None,
    text_mask: Tensor | None,
) -> VisualTokens:
    """The visual tokens `[B, N, D]` of equal ``images`` with what the record holds about them."""
    grid = record.grids[images[0]]
    tokens = VisualTokens(
        features, patches=patches, depth=record.depth, text=text, text_mask=text_mask, notes=record.notes
    )
    if grid[0] * grid[1] == features.shape[1]:
        tokens = replace(tokens, grid=grid)
    read: dict[str, Any] = {
        name: {layer: torch.stack([rows[image] for image in images]) for layer, rows in layers.items()}
        for name, layers in record.read.items()
    }
    if record.similar:
        read["cls_similarity"] = torch.stack([record.similar[image] for image in images])
    return replace(tokens, **read)
