"""Inside the vision tower: tokens leave or merge between its layers, and later layers run on what is left.

A layer of a plain ViT ends with ``rows + mlp(norm(rows))`` and holds these rows itself, so a hook before the norm can
shorten what the MLP sees, but not the rows it is added to. Therefore three hooks: the one before the norm makes the
short rows, the one behind the MLP keeps its output, and the one behind the layer returns their sum instead. They are
forward hooks, so nobody's ``forward`` is replaced (a library that spreads a model over devices may have done that),
the layer's own code stays in charge, and whoever records hidden states behind us records the short ones.

At the end of the tower every recorded state gets its native shape back: rows at their anchors, zeros between.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokensieve.engine.prompt.placeholders import equal_groups
from tokensieve.errors import Refusal
from tokensieve.methods import EncoderMethod
from tokensieve.models import Family
from tokensieve.models.vit import layers_used
from tokensieve.ops import mask_bias
from tokensieve.reduction import Mixing, Reduction
from tokensieve.tokens import VisualTokens

SUMMED = ("cls_attention", "cls_wide", "received")  # what a merged token has more of; of other evidence it has a mean


@dataclass(frozen=True, eq=False)
class TowerStep:
    """What one stage did to the rows of all images; the last columns of images with fewer tokens are padding.

    Attributes:
        layer: in which layer; −1 for what entered the first one.
        slot: `[B, n]`, where each token before it went, −1 if nowhere.
        weight: `[B, n]` float32, its share of that slot's row.
        anchors: `[B, m]`, the place of each token after it in the whole image; the image's size on padding.
        sizes: `[B, m]` float32, patches that each of these stands for; 0 on padding.
        lengths: per image, the tokens after it.
    """

    layer: int
    slot: Tensor
    weight: Tensor
    anchors: Tensor
    sizes: Tensor
    lengths: list[int]

    @property
    def ragged(self) -> bool:
        return min(self.lengths) < self.anchors.shape[1]


@dataclass(eq=False)
class TowerPass:
    """One call of the tower on its way.

    Attributes:
        grid: (height, width) of the images in the tower's rows.
        steps: what entered, and what each stage did that let tokens go.
        notes: per image, what the stages had to say; ``idle``: those that kept it whole.
        merged: whether a stage merged, rather than only dropped.
        bias: `[B, 1, 1, specials + n]`, what attention must add to its scores from here on.
        seen: what the layer of the next stage told, by evidence.
        middle, added: in a stage's layer, the rows it leaves, and what the MLP adds to them.
    """

    grid: tuple[int, int]
    steps: list[TowerStep]
    notes: list[list[str]]
    idle: list[list[str]]
    merged: bool = False
    bias: Tensor | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)
    middle: Tensor | None = None
    added: Tensor | None = None

    @classmethod
    def start(cls, grids: list[tuple[int, int]], device: torch.device) -> TowerPass:
        images, total = len(grids), grids[0][0] * grids[0][1]
        place = torch.arange(total, device=device).expand(images, -1)
        ones = torch.ones_like(place, dtype=torch.float32)
        entered = TowerStep(-1, place, ones, place, ones, [total] * images)
        return cls(grids[0], [entered], [[] for _ in grids], [[] for _ in grids])

    @property
    def total(self) -> int:
        """N, the tokens of each image that entered the tower."""
        return self.steps[0].lengths[0]

    @property
    def now(self) -> TowerStep:
        return self.steps[-1]

    def after(self, layer: int) -> TowerStep:
        """The last step up to the output of ``layer``."""
        return next(step for step in reversed(self.steps) if step.layer <= layer)

    def arrivals(self, depth: int) -> list[tuple[Tensor, Tensor]]:
        """For what each layer attends to (and, last, for what the tower puts out): final slot and weight, `[B, n]`.

        Final slots are in the order of their places; −1: the token is not in any.
        """
        real = self.now.anchors < self.total
        slot = self.now.anchors.argsort(-1).argsort(-1).masked_fill(~real, -1)
        weight, found, steps = real.float(), [], {step.layer: step for step in self.steps[1:]}
        found.append((slot, weight))
        for layer in reversed(range(depth)):
            if layer in steps:
                step, inner = steps[layer], steps[layer].slot.clamp(min=0)
                slot = slot.gather(1, inner).masked_fill(step.slot < 0, -1)
                weight = weight.gather(1, inner) * step.weight
            found.append((slot, weight))
        return found[::-1]


class Tower:
    """Hooks on the layers of one vision tower, for one encoder method.

    Raises:
        ValueError: if the tower is no plain ViT, or lacks a layer.
    """

    def __init__(self, family: Family, model: Any, method: EncoderMethod) -> None:
        self.tower: Any = family.tower(model)
        self.method, self.specials = method, int(family.has_cls(self.tower))
        layers = family.vit_layers(self.tower)
        if not layers:
            raise Refusal(
                f"{method} lets tokens leave between the layers of the vision tower; not supported in {family.title}: "
                "its patches run packed, in windows"
            )
        self.layers, self.depth = len(layers), family.layers_used(model)
        self.stages = method.stages(self.depth)
        self._parts, self._local = layers, threading.local()
        self._handles: list[Any] = []

    def install(self) -> None:
        """Hook the layers."""
        for number, parts in enumerate(self._parts):
            hooks = [parts.attention.register_forward_pre_hook(self._attend, with_kwargs=True)]
            if number in self.stages:
                if not self.method.behind:
                    hooks.append(parts.norm.register_forward_pre_hook(partial(self._between, number)))
                    hooks.append(parts.mlp.register_forward_hook(self._added))
                hooks.append(parts.layer.register_forward_hook(partial(self._behind, number), prepend=True))
            self._handles += hooks

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    # -- called around the tower --------------------------------------------------------------------------------------

    def start(self, inputs: dict[str, Any], grids: list[tuple[int, int]], device: torch.device) -> None:
        """A call of the tower begins.

        Raises:
            ValueError: for what cannot be done right; nothing has run then.
        """
        selected = inputs.get("output_hidden_states")
        if isinstance(selected, list | tuple) or (isinstance(selected, int) and not isinstance(selected, bool)):
            used = layers_used(self.tower, selected if isinstance(selected, int) else list(selected))
            if used != self.depth:
                raise Refusal(
                    f"{self.method} was attached to {self.depth} layers of the vision tower; this call takes its "
                    f"features from layer {used - 1}: set vision_feature_layer in the model's config before attaching"
                )
        if self.tower.training and self.tower.is_activation_checkpointing:
            raise Refusal("gradient checkpointing runs layers twice and would reduce twice; turn it off in the tower")
        counts = self.method.per_stage(grids[0][0] * grids[0][1], len(self.stages))
        if self.method.proportional or (counts is None and len(grids) > 1):
            kernel = str(self.tower.config._attn_implementation)
            if "flash" in kernel:
                raise Refusal(
                    f"{self.method} adds to attention scores, which {kernel} cannot: load the vision tower with sdpa"
                )
        self._local.passage = TowerPass.start(grids, device)

    def see(self, seen: dict[str, Tensor]) -> None:
        """What the method wants to know in the layer that runs."""
        if self.passage is not None:
            self.passage.seen = seen

    @property
    def passage(self) -> TowerPass | None:
        """The call of this thread."""
        return getattr(self._local, "passage", None)

    def finish(self) -> TowerResult:
        """The call ends."""
        passage = self.passage
        assert passage is not None
        self.stop()
        return TowerResult(passage, self.layers, self.specials)

    def stop(self) -> None:
        """Nothing is to happen until the next start: a call may have failed on its way."""
        self._local.passage = None

    def restore(self, passage: TowerPass, output: Any) -> None:
        """Give every state that the tower puts out its native shape, in place."""
        output.last_hidden_state = self._native(passage, output.last_hidden_state, self.layers - 1)
        if getattr(output, "hidden_states", None) is not None:
            states = enumerate(output.hidden_states, start=-1)
            output.hidden_states = tuple(self._native(passage, rows, layer) for layer, rows in states)

    def _native(self, passage: TowerPass, rows: Tensor | None, layer: int) -> Tensor | None:
        """The output of a layer with rows at their anchors, zeros between."""
        step = passage.after(layer)
        if rows is None or step.layer < 0:
            return rows
        patches, (images, _, width) = rows[:, self.specials :], rows.shape
        index = step.anchors[..., None].expand_as(patches)
        # padding lands in a row behind the last one, which is cut off
        spread = patches.new_zeros(images, passage.total + 1, width).scatter(1, index, patches)[:, :-1]
        return torch.cat([rows[:, : self.specials], spread], 1)

    # -- hooks on the layers ------------------------------------------------------------------------------------------

    def _attend(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        passage = self.passage
        if passage is None or passage.bias is None:
            return None
        return args, {**kwargs, "attention_mask": passage.bias}

    def _between(self, number: int, norm: nn.Module, args: Any) -> Any:
        passage = self.passage
        if passage is None:
            return None
        passage.middle = self._reduce(passage, number, args[0])
        return None if passage.middle is None else (passage.middle,)

    def _added(self, mlp: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        passage = self.passage
        if passage is None or passage.middle is None:
            return None
        passage.added = output
        return output[:, :1]  # the layer adds it to its long rows: any row will do, the sum is replaced

    def _behind(self, number: int, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        passage = self.passage
        if passage is None:
            return None
        if self.method.behind:
            return self._reduce(passage, number, output)
        middle, added, passage.middle, passage.added = passage.middle, passage.added, None, None
        return None if middle is None or added is None else middle + added

    # -- a stage ------------------------------------------------------------------------------------------------------

    def _reduce(self, passage: TowerPass, number: int, rows: Tensor) -> Tensor | None:
        """Let the method decide; the rows that are left, ``None`` if all are."""
        before, patches = passage.now, rows[:, self.specials :]
        groups = equal_groups(before.lengths)
        decided = [(images, self._decide(passage, number, patches, images)) for images in groups]
        passage.seen.clear()
        for images, decision in decided:
            for image in images:
                (passage.idle if decision.whole else passage.notes)[image] += decision.notes
        if all(decision.whole for _, decision in decided):
            return None
        decision = decided[0][1]
        if len(decided) == 1 and decision.valid is None:
            parts = _apply(decision, patches, before.anchors, before.sizes)
            lengths = [decision.slots] * len(rows)
        else:
            of = {image: one for images, many in decided for image, one in zip(images, many, strict=True)}
            lengths = [of[image].slots for image in range(len(rows))]
            if lengths == before.lengths:
                return None
            each = [
                _apply(of[image], patches[image, :n], before.anchors[image, :n], before.sizes[image, :n])
                for image, n in enumerate(before.lengths)
            ]
            columns = zip(zip(*each, strict=True), (0, -1, 0, passage.total, 0), strict=True)
            parts = [pad_sequence(list(column), batch_first=True, padding_value=filler) for column, filler in columns]
        left, slot, weight, anchors, sizes = parts
        passage.steps.append(TowerStep(number, slot, weight, anchors, sizes, lengths))
        passage.merged = passage.merged or any(decision.mixing is not None for _, decision in decided)
        passage.bias = self._bias(passage.now, rows.dtype)
        return torch.cat([rows[:, : self.specials], left], 1)

    def _decide(self, passage: TowerPass, number: int, patches: Tensor, images: list[int]) -> Reduction:
        """What becomes of equal images."""
        length, everyone = passage.now.lengths[images[0]], len(images) == len(patches)

        def of(rows: Tensor) -> Tensor:
            return rows if everyone else rows[images, :length]

        tokens = VisualTokens(
            of(patches),
            grid=passage.grid if length == passage.total else None,
            sizes=of(passage.now.sizes),
            specials=self.specials,
            stage=self.stages.index(number),
            stages=len(self.stages),
            entered=passage.total,
        )
        seen: dict[str, Any] = {name: {number: of(rows[:, self.specials :])} for name, rows in passage.seen.items()}
        return self.method(replace(tokens, **seen))

    def _bias(self, step: TowerStep, dtype: torch.dtype) -> Tensor | None:
        """The log of each key's size where attention is proportional; the lowest number on padding."""
        if not self.method.proportional and not step.ragged:
            return None
        counted = step.sizes if self.method.proportional else (step.sizes > 0).float()
        return mask_bias(nn.functional.pad(counted, (self.specials, 0), value=1.0), dtype)


def _apply(decision: Reduction, rows: Tensor, anchors: Tensor, sizes: Tensor) -> list[Tensor]:
    """What a decision makes of rows: these, where each token went, with which weight; the slots' anchors and sizes."""
    slot, mixing = decision.source, decision.mixing
    weight = (slot >= 0).float()
    if mixing is not None:  # a token goes into one slot only
        weight = torch.zeros_like(weight).scatter_add(-1, mixing.source, mixing.weight)
    left = anchors.gather(-1, decision.anchors)
    return [decision.apply(rows), slot, weight, left, _gathered(sizes[..., None], slot, decision.slots)[..., 0]]


def _gathered(values: Tensor, slot: Tensor, slots: int) -> Tensor:
    """Sums of `[…, n, E]` over the tokens of each of ``slots`` slots, `[…, slots, E]`; slot −1 counts for nobody."""
    index = slot.remainder(slots + 1)[..., None].expand_as(values)  # −1 becomes one slot more, which is cut off
    sums = values.new_zeros((*values.shape[:-2], slots + 1, values.shape[-1])).scatter_add(-2, index, values)
    return sums[..., :-1, :]


class TowerResult:
    """What left a finished call of the tower: its decisions, and evidence in terms of the tokens that are left."""

    def __init__(self, passage: TowerPass, layers: int, specials: int) -> None:
        self.passage, self.specials = passage, specials
        self._arrivals = passage.arrivals(layers)

    @property
    def short(self) -> bool:
        """Whether any token left."""
        return len(self.passage.steps) > 1

    def reductions(self) -> list[Reduction]:
        """Per image, all stages as one decision about its patches."""
        passage, (slot, weight) = self.passage, self._arrivals[0]
        anchors, patch = passage.now.anchors.sort(-1).values, torch.arange(passage.total, device=slot.device)
        found = []
        for image, length in enumerate(passage.now.lengths):
            whole = length == passage.total
            mixed = Mixing(slot[image].clamp(min=0), patch, weight[image]) if passage.merged and not whole else None
            notes = tuple(dict.fromkeys((passage.idle if whole else passage.notes)[image]))
            found.append(Reduction(passage.total, anchors[image, :length], mixed, grid=passage.grid, notes=notes))
        return found

    def lift(self, name: str, layer: int, rows: Tensor) -> list[Tensor]:
        """What was read about the tokens of ``layer``, `[B, specials + n, …]`, per image about those left, `[K, …]`.

        Attention that its members get adds up in a merged token; of everything else it has their weighted mean.
        """
        (slot, weight), now = self._arrivals[layer], self.passage.now
        values = rows[:, self.specials :]
        flat = values.reshape(*values.shape[:2], -1).float()
        if name not in SUMMED:
            flat = flat * weight[..., None]
        lifted = _gathered(flat, slot, now.anchors.shape[1]).to(rows.dtype).view(len(rows), -1, *values.shape[2:])
        return [lifted[image, :length] for image, length in enumerate(now.lengths)]
