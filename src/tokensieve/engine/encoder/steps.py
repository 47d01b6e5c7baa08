"""Bookkeeping of one pass through the vision encoder: the tokens that left or merged in each layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokensieve.methods import Needs
from tokensieve.reduction import Mixing, Reduction


@dataclass(frozen=True, eq=False)
class TowerStep:
    """The change that one layer made to the rows of all images. The last columns of shorter images are padding.

    Attributes:
        layer: the layer; −1 for the rows that entered the first one.
        slot: `[B, n]`, the slot of each token that was there before; −1 if it was dropped.
        weight: `[B, n]` float32, the token's share of that slot's row.
        anchors: `[B, m]`, the place of each remaining token in the whole image; the image's size on padding.
        sizes: `[B, m]` float32, the number of patches that each remaining token stands for; 0 on padding.
        lengths: per image, the remaining tokens.
    """

    layer: int
    slot: Tensor
    weight: Tensor
    anchors: Tensor
    sizes: Tensor
    lengths: list[int]

    @property
    def ragged(self) -> bool:
        """Whether some image has padding."""
        return min(self.lengths) < self.anchors.shape[1]


@dataclass(eq=False)
class TowerPass:
    """One running call of the vision encoder.

    Attributes:
        grid: (height, width) of the images in the encoder's rows.
        steps: the rows that entered, then the change of every layer in which tokens left.
        notes: per image, the remarks of the decisions that reduced it.
        notes_if_whole: per image, the remarks of the decisions that kept it whole.
        merged: whether a decision merged tokens; else all only dropped them.
        bias: `[B, 1, 1, specials + n]`, added to the attention scores from here on.
        evidence: `[B, specials + n, ...]` by name, read in the layer of the next decision.
        scores: `[B, n]`, the scores of the last decision, where the method requests them; 0 on padding.
        residual, mlp_output: in a layer that reduces between attention and MLP, the short rows and the MLP's output.
    """

    grid: tuple[int, int]
    steps: list[TowerStep]
    notes: list[list[str]]
    notes_if_whole: list[list[str]]
    merged: bool = False
    bias: Tensor | None = None
    evidence: dict[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    residual: Tensor | None = None
    mlp_output: Tensor | None = None

    @classmethod
    def start(cls, grid: tuple[int, int], images: int, device: torch.device) -> TowerPass:
        """Start a pass of equal images."""
        total = grid[0] * grid[1]
        place = torch.arange(total, device=device).expand(images, -1)
        ones = torch.ones_like(place, dtype=torch.float32)
        entered = TowerStep(-1, place, ones, place, ones, [total] * images)
        return cls(grid, [entered], [[] for _ in range(images)], [[] for _ in range(images)])

    @property
    def total(self) -> int:
        """N, the tokens of each image that entered the vision encoder."""
        return self.steps[0].lengths[0]

    @property
    def latest(self) -> TowerStep:
        return self.steps[-1]

    def after(self, layer: int) -> TowerStep:
        """Return the last step up to the output of ``layer``."""
        return next(step for step in reversed(self.steps) if step.layer <= layer)

    def final_slots(self, depth: int) -> list[tuple[Tensor, Tensor]]:
        """Return the final slot and weight, `[B, n]`, of the tokens in each layer's attention, and in the output.

        Entry ``layer`` is about the tokens that this layer attends to; the last entry is about the output. Final slots
        are numbered in the order of their anchors; −1: the token is in no slot.
        """
        valid = self.latest.anchors < self.total
        # argsort twice: the rank of each anchor, which is the slot's number in raster order
        slot = self.latest.anchors.argsort(-1).argsort(-1).masked_fill(~valid, -1)
        weight, by_layer = valid.float(), {step.layer: step for step in self.steps[1:]}
        slots = [(slot, weight)]
        for layer in reversed(range(depth)):
            if layer in by_layer:  # follow each token of this layer to its slot, and on to that slot's final one
                step, next_slot = by_layer[layer], by_layer[layer].slot.clamp(min=0)
                slot = slot.gather(1, next_slot).masked_fill(step.slot < 0, -1)
                weight = weight.gather(1, next_slot) * step.weight
            slots.append((slot, weight))
        return slots[::-1]


class TowerResult:
    """A finished pass: its decisions, and the conversion of evidence to the tokens that are left."""

    def __init__(self, tower_pass: TowerPass, layers: int, specials: int) -> None:
        self.tower_pass, self.specials = tower_pass, specials
        self._final_slots = tower_pass.final_slots(layers)

    @property
    def reduced(self) -> bool:
        """Whether any token left."""
        return len(self.tower_pass.steps) > 1

    def reductions(self) -> list[Reduction]:
        """Return per image the decisions of all layers as one decision about its patches."""
        finished, (slot, weight) = self.tower_pass, self._final_slots[0]
        anchors, patch = finished.latest.anchors.sort(-1).values, torch.arange(finished.total, device=slot.device)
        reductions = []
        for image, length in enumerate(finished.latest.lengths):
            whole = length == finished.total
            mixing = Mixing(slot[image].clamp(min=0), patch, weight[image]) if finished.merged and not whole else None
            notes = tuple(dict.fromkeys((finished.notes_if_whole if whole else finished.notes)[image]))
            reductions.append(
                Reduction(finished.total, anchors[image, :length], mixing, grid=finished.grid, notes=notes)
            )
        return reductions

    def to_remaining(self, name: str, layer: int, rows: Tensor) -> list[Tensor]:
        """Convert evidence about the tokens of ``layer``, `[B, specials + n, …]`, to those left, `[K, …]` per image.

        A merged token gets the sum or the weighted mean of its members' evidence, as ``Evidence.merged`` states.
        """
        (slot, weight), latest = self._final_slots[layer], self.tower_pass.latest
        values = rows[:, self.specials :]
        flat = values.reshape(*values.shape[:2], -1).float()  # [B, n, E]: evidence of any shape sums alike
        if Needs.table()[name].merged == "mean":
            flat = flat * weight[..., None]
        slots = latest.anchors.shape[1]
        summed = sum_by_slot(flat, slot, slots).to(rows.dtype).view(len(rows), -1, *values.shape[2:])
        return [summed[image, :length] for image, length in enumerate(latest.lengths)]


def apply_decision(decision: Reduction, rows: Tensor, anchors: Tensor, sizes: Tensor) -> list[Tensor]:
    """Apply a decision to rows `[…, n, D]`, and to their anchors and sizes `[…, n]`.

    Returns the new rows, then the slot, weight, anchors and sizes of a :class:`TowerStep`.
    """
    slot, mixing = decision.source, decision.mixing
    weight = (slot >= 0).float()
    if mixing is not None:  # a token merges into one slot only, so its one entry is its weight
        weight = torch.zeros_like(weight).scatter_add(-1, mixing.source, mixing.weight)
    new_anchors = anchors.gather(-1, decision.anchors)
    new_sizes = sum_by_slot(sizes[..., None], slot, decision.slots)[..., 0]
    return [decision.apply(rows), slot, weight, new_anchors, new_sizes]


def sum_by_slot(values: Tensor, slot: Tensor, slots: int) -> Tensor:
    """Sum `[…, n, E]` over the tokens of each slot, `[…, slots, E]`; tokens of slot −1 are left out."""
    index = slot.remainder(slots + 1)[..., None].expand_as(values)  # −1 becomes an extra last slot, which is cut off
    sums = values.new_zeros((*values.shape[:-2], slots + 1, values.shape[-1])).scatter_add(-2, index, values)
    return sums[..., :-1, :]
