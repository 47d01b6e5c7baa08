"""W, the sparse matrix of a reduction that merges tokens, and its products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ENTRIES = 16384  # entries of a mixing matrix applied at once, so that a long video needs no float32 copy of all rows


@dataclass(frozen=True, eq=False)
class Mixing:
    """A sparse matrix W `[K, N]` of E entries: ``W[slot[e], source[e]] += weight[e]``. Zero weights are padding.

    Attributes:
        slot: output row of each entry, `[E]` or `[B, E]`, int64.
        source: input row of each entry, same shape.
        weight: same shape, float32.
    """

    slot: Tensor
    source: Tensor
    weight: Tensor

    def __getitem__(self, image: int) -> Mixing:
        """Return the matrix of one image of a batch."""
        return Mixing(self.slot[image], self.source[image], self.weight[image])

    def to(self, device: Any) -> Mixing:
        """Copy the entries to a device."""
        return Mixing(self.slot.to(device), self.source.to(device), self.weight.to(device))

    def only(self, valid: Tensor) -> Mixing:
        """Return the matrix of one image without the rows where ``valid`` `[K]` is False; later rows move up."""
        entries, number = valid[self.slot], valid.cumsum(0) - 1
        return Mixing(number[self.slot[entries]], self.source[entries], self.weight[entries])

    def slot_of_each(self, total: int) -> Tensor:
        """Return the slot in which each of ``total`` tokens has its largest weight, −1 if none, `[N]` or `[B, N]`."""
        # [N]: each token's largest weight; entries that reach it and are no padding name its slot
        empty = self.weight.new_zeros((*self.source.shape[:-1], total))
        weight = empty.scatter_reduce(-1, self.source, self.weight, "amax")
        best = (self.weight == weight.gather(-1, self.source)) & (self.weight > 0)
        slot = self.slot.masked_fill(~best, -1)
        return slot.new_full(weight.shape, -1).scatter_reduce(-1, self.source, slot, "amax")

    def counts(self, slots: int) -> Tensor:
        """Return the number of tokens in each of K = ``slots`` rows, `[K]` or `[B, K]`."""
        return self.slot.new_zeros((*self.slot.shape[:-1], slots)).scatter_add(-1, self.slot, (self.weight != 0).long())

    def sums(self, slots: int) -> Tensor:
        """Return the sum of each row's weights, `[K]` or `[B, K]` float32."""
        return self.weight.new_zeros((*self.slot.shape[:-1], slots)).scatter_add(-1, self.slot, self.weight)

    def dense(self, slots: int, total: int) -> Tensor:
        """Return W as a dense float32 tensor `[K, N]` or `[B, K, N]`."""
        zeros = self.weight.new_zeros((*self.slot.shape[:-1], slots, total))
        # entry (slot, source) of a row-major [K, N] matrix is at slot · N + source
        return zeros.flatten(-2).scatter_add(-1, self.slot * total + self.source, self.weight).view_as(zeros)

    def apply(self, rows: Tensor, slots: int) -> Tensor:
        """Return ``W @ rows``, `[N, D]` to `[K, D]` (or batched), in the dtype of ``rows``; sums run in float32."""
        out = torch.zeros((*self.slot.shape[:-1], slots, rows.shape[-1]), device=rows.device)
        entries = (torch.split(t, ENTRIES, dim=-1) for t in (self.slot, self.source, self.weight))
        for slot, source, weight in zip(*entries, strict=True):
            parts = rows.gather(-2, source[..., None].expand(*source.shape, rows.shape[-1])).float() * weight[..., None]
            out = out.scatter_add(-2, slot[..., None].expand_as(parts), parts)
        return out.to(rows.dtype)

    def after(self, first: Mixing) -> Mixing:
        """Return the product W_this · W_first of one image: one entry for each pair of slot and source, sorted."""
        # an inner join: each entry of this matrix meets all entries of `first` whose slot is its source
        order = first.slot.argsort(stable=True)  # groups the entries of `first` by slot
        count = torch.bincount(first.slot, minlength=int(self.source.max()) + 1 if self.source.numel() else 0)
        start, repeats = count.cumsum(0) - count, count[self.source]
        # left, right: the entries of this matrix and of `first` in each joined pair
        left = torch.arange(len(self.slot), device=order.device).repeat_interleave(repeats)
        place_in_group = torch.arange(len(left), device=order.device) - (repeats.cumsum(0) - repeats)[left]
        right = order[start[self.source[left]] + place_in_group]
        pairs = torch.stack([self.slot[left], first.source[right]])
        (slot, source), entry_of_pair = torch.unique(pairs, dim=1, return_inverse=True)  # adds up several paths
        weight = torch.zeros(slot.shape, device=slot.device)
        return Mixing(slot, source, weight.index_add(0, entry_of_pair, self.weight[left] * first.weight[right]))
