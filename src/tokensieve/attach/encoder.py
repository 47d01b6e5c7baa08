"""The encoder stage: what is read from, and changed in, a call of the vision tower.

``generate()`` encodes images before the first forward and insists on the usual number of features, so nothing is
dropped here: a record of the call travels on the tower's output, and the connector stage acts on it.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.attach.probe import Probe, attention_from_cls, attention_received
from tokensieve.methods import Method, Needs
from tokensieve.methods.baselines import Downsample
from tokensieve.models import Family
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens, resolve_layers

RECORD = "_tokensieve_record"
RECEIVED = "no [CLS] token in this encoder: attention received from all patches, in layers of global attention"


@dataclass(frozen=True)
class Record:
    """What one tower call told about its images, in their order.

    Attributes:
        grids: (height, width) in the visual tokens that the tower made.
        layers: encoder layers that were probed.
        rows: `[S, N]` per image, one row per probed layer.
        similar: `[N]` per image, cosine to [CLS] in what the tower puts out, where a method asks for it.
        depth: number of encoder layers that can be probed.
        notes: remarks on the evidence.
        reductions: what an encoder method did per image; the dropped slots hold zeros.
    """

    grids: list[tuple[int, int]]
    layers: list[int]
    rows: list[Tensor]
    similar: list[Tensor]
    depth: int
    notes: tuple[str, ...]
    reductions: list[Reduction] | None


class EncoderHooks:
    """Hooks on one vision tower: probes, and the resizing of ``downsample``.

    Raises:
        ValueError: if the tower lacks a layer or the [CLS] token that is needed.
    """

    def __init__(self, family: Family, model: Any, needs: Needs, method: Method | None) -> None:
        self.family, self.tower = family, family.tower(model)
        self.downsample = method if isinstance(method, Downsample) else None
        self._names = list(inspect.signature(type(self.tower).forward).parameters)[1:]
        self._local = threading.local()
        attentions, self.layers = family.attentions(self.tower), []
        self.depth, self.cls = len(attentions), family.has_cls(self.tower)
        self.similarity = needs.cls_similarity
        if self.similarity and not self.cls:
            raise ValueError("this method compares patches with the encoder's [CLS] token; this encoder has none")
        if needs.cls_attention is not None:
            self.layers = resolve_layers(needs.cls_attention, self.depth)
        read = attention_from_cls if self.cls else attention_received
        self.probes = [Probe(attentions[layer], read) for layer in self.layers]
        self._handles = [
            self.tower.register_forward_pre_hook(self._before, with_kwargs=True),
            self.tower.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for probe in self.probes:
            probe.remove()

    def _before(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        grids = self.family.grids(tower, inputs)
        reductions = None
        if self.downsample is not None:
            inputs, reductions = self._resize(inputs, grids)
        self._local.call = (inputs, reductions)
        for probe in self.probes:
            probe.arm()
        return (), inputs

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
        inputs, reductions = self._local.call
        grids = self.family.grids(tower, inputs)
        read = [self.family.per_token(tower, inputs, probe.take()) for probe in self.probes]
        rows = [torch.stack(image) for image in zip(*read, strict=True)]
        similar = self.family.per_token(tower, inputs, [_to_cls(output.last_hidden_state)]) if self.similarity else []
        if reductions is not None and not all(reduction.whole for reduction in reductions):
            self.family.restore(tower, output, reductions)
        notes = () if self.cls or not self.layers else (RECEIVED,)
        setattr(output, RECORD, Record(grids, self.layers, rows, similar, self.depth, notes, reductions))


def _to_cls(rows: Tensor) -> Tensor:
    """Cosine of every row to row 0, `[B, n, D]` to `[B, n]`."""
    return torch.cosine_similarity(rows[:, :1].float(), rows.float(), dim=-1)


def evidence(
    record: Record, images: list[int], features: Tensor, text: Tensor | None, text_mask: Tensor | None
) -> VisualTokens:
    """The visual tokens `[B, N, D]` of equal ``images`` with what the record holds about them."""
    grid = record.grids[images[0]]
    tokens = VisualTokens(features, depth=record.depth, text=text, text_mask=text_mask, notes=record.notes)
    if grid[0] * grid[1] == features.shape[1]:
        tokens = replace(tokens, grid=grid)
    if record.similar:
        tokens = replace(tokens, cls_similarity=torch.stack([record.similar[image] for image in images]))
    if record.rows:
        rows = torch.stack([record.rows[image] for image in images], 1)
        tokens = replace(tokens, cls_attention=dict(zip(record.layers, rows, strict=True)))
    return tokens
