"""A reduction: the tokens that stay, W, and rows that a net made or learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokensieve.errors import Refusal
from tokensieve.reduction import storing
from tokensieve.reduction.mixing import Mixing


@dataclass(frozen=True, eq=False)
class Reduction:
    """A decision that turns N tokens into K slots, for one image or for B images of equal size.

    Output rows are ``W @ input rows``, or made by a net (``rows``). Slot ``k`` has the place and the position id of
    token ``anchors[k]``. In a decision for B images all tensors have a leading dimension ``B``.

    Attributes:
        total: N, the number of tokens before the reduction.
        anchors: `[K]` or `[B, K]`, int64, ascending and distinct in each row.
        mixing: W; ``None`` means the identity on the anchors (pure pruning).
        valid: `[B, K]` bool if an adaptive method keeps a different number per image; ``None`` if all slots are valid.
            Padded slots come last, repeat the last anchor, and have only zero entries in W.
        scores: `[N]` or `[B, N]`, the scores that the method ranked by, if any.
        grid: (height, width) of the N tokens, if they form one grid.
        notes: remarks for a reader of this decision.
        projected: True if the input rows of W are the projector's outputs. False if they are its inputs; the rows that
            W makes of them are then projected.
        rows: `[K, D]` or `[B, K, D]`, output rows that a net made, in the space of the LLM's input; ``None``: W makes
            them. W then only says which tokens each row is made of, for drawings and for the sizes of ``repair``.
        added: R, the number of registers: slots behind the others whose rows are learned. They have no anchor, and a
            zero row in W.
        soft: True while a net is trained by attention: no token leaves, rows stay as they are, and each weight of W is
            the share in which a token takes part in attention.
    """

    total: int
    anchors: Tensor
    mixing: Mixing | None = None
    valid: Tensor | None = None
    scores: Tensor | None = None
    grid: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    projected: bool = True
    rows: Tensor | None = None
    added: int = 0
    soft: bool = False

    @classmethod
    def identity(cls, total: int, batch: int | None = None, device: Any = None, **fields: Any) -> Reduction:
        """Keep all ``total`` tokens of one image or of ``batch`` images."""
        anchors = torch.arange(total, device=device)
        return cls(total, anchors if batch is None else anchors.expand(batch, -1), **fields)

    def __repr__(self) -> str:
        images = f"{self.anchors.shape[0]} images of " if self.anchors.ndim > 1 else ""
        merged = "pruned" if self.mixing is None else "merged"
        kind = "all kept" if self.whole else "made" if self.rows is not None else merged
        kept = (
            f"{self.slots - self.added} of {self.total} tokens"
            if self.valid is None
            else f"up to {self.slots - self.added} of {self.total} tokens"
        )
        added = f", {self.added} registers" if self.added else ""
        grid = f", grid {self.grid[0]} × {self.grid[1]}" if self.grid else ""
        return f"Reduction({images}{kept}, {kind}{added}{grid})"

    def fault(self, values: bool = True, ascending: bool = True) -> str | None:
        """Return what contradicts the description of the attributes; ``None`` if nothing does.

        Args:
            values: compare the entries of the tensors, too, which waits for their device.
            ascending: False inside a vision encoder, whose layers may receive their rows in any order.
        """
        *lead, slots = self.anchors.shape or (0,)
        m = self.mixing
        if self.added < 0 or (self.added and self.valid is not None):
            return f"added must be at least 0, and 0 where valid is set; got {self.added}"
        indices = {"anchors": self.anchors} | ({} if m is None else {"slot": m.slot, "source": m.source})
        for name, tensor in indices.items():
            if tensor.dtype != torch.int64 or tensor.ndim not in (1, 2):
                return f"{name} must be int64, [E] or [B, E]; got {tensor.dtype}, {list(tensor.shape)}"
        shapes = {"valid": (self.valid, [*lead, slots]), "scores": (self.scores, [*lead, self.total])}
        if m is not None:
            entries = [*lead, m.source.shape[-1]]
            shapes |= {"slot": (m.slot, entries), "source": (m.source, entries), "weight": (m.weight, entries)}
        for name, (optional, shape) in shapes.items():
            if optional is not None and list(optional.shape) != shape:
                return f"{name} must have shape {shape}; got {list(optional.shape)}"
        if self.rows is not None and list(self.rows.shape[:-1]) != [*lead, slots]:
            return f"rows must start with {[*lead, slots]}; got {list(self.rows.shape)}"
        if not values:
            return None
        for name, tensor in indices.items():
            end = slots if name == "slot" else self.total
            if tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) < end):
                return f"{name} must be from 0 to {end - 1}; got {int(tensor.min())} to {int(tensor.max())}"
        anchors = self.anchors
        if self.valid is not None:  # padded slots come last and repeat an anchor: replace it by larger numbers
            anchors = anchors.where(self.valid, torch.arange(slots, device=anchors.device) + self.total)
        if bool((anchors.sort(-1).values.diff(dim=-1) == 0).any()):
            return "anchors must be distinct"
        return "anchors must ascend" if ascending and bool((anchors.diff(dim=-1) < 0).any()) else None

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def kept(self) -> Tensor:
        """Return the original indices of the slots' anchors, `[K]` or `[B, K]`, ascending."""
        return self.anchors

    @property
    def slots(self) -> int:
        """Return K, the number of slots (those of the image with most slots, if ``valid`` is set), with registers."""
        return self.anchors.shape[-1] + self.added

    @property
    def whole(self) -> bool:
        """Return whether no token was dropped, merged or added."""
        kept = self.slots == self.total and self.valid is None and self.mixing is None
        return kept and self.rows is None and not self.added

    @property
    def source(self) -> Tensor:
        """Return the slot of each original token, −1 if dropped, `[N]` or `[B, N]`.

        A token that was mixed into several slots gets the slot in which it has the largest weight.
        """
        if self.mixing is None:
            slots = torch.arange(self.anchors.shape[-1], device=self.anchors.device).expand_as(self.anchors)
            if self.valid is not None:
                slots = slots.masked_fill(~self.valid, -1)
            empty = self.anchors.new_full((*self.anchors.shape[:-1], self.total), -1)
            # padded slots repeat a kept anchor: the larger value (the valid slot, not −1) must win
            return empty.scatter_reduce(-1, self.anchors, slots, "amax")
        return self.mixing.slot_of_each(self.total)

    @property
    def counts(self) -> Tensor:
        """Return the number of original tokens in each slot, `[K]` or `[B, K]`; 0 for registers."""
        if self.mixing is not None:
            counts = self.mixing.counts(self.anchors.shape[-1])
        else:
            counts = torch.ones_like(self.anchors) if self.valid is None else self.valid.long()
        return pad(counts, (0, self.added))

    @property
    def ranking(self) -> Tensor | None:
        """Return the scores of the slots' anchors, `[K]` or `[B, K]`."""
        return None if self.scores is None else self.scores.gather(-1, self.anchors)

    @property
    def weight_sums(self) -> Tensor:
        """Return the sum of each slot's weights, `[K]` or `[B, K]` float32; it is 1 for pruning and averages."""
        if self.mixing is None:
            return self.counts.float()
        return pad(self.mixing.sums(self.anchors.shape[-1]), (0, self.added))

    def __iter__(self) -> Iterator[Reduction]:
        """Iterate over the images of a batched Reduction."""
        if self.anchors.ndim == 1:
            raise TypeError("this Reduction holds one image")
        return (self[i] for i in range(self.anchors.shape[0]))

    def __getitem__(self, image: int) -> Reduction:
        """Return the decision for one image of a batched Reduction, without padded slots."""
        if self.anchors.ndim == 1:
            raise TypeError("this Reduction holds one image")
        pick = Reduction(
            self.total,
            self.anchors[image],
            None if self.mixing is None else self.mixing[image],
            scores=None if self.scores is None else self.scores[image],
            grid=self.grid,
            notes=self.notes,
            projected=self.projected,
            rows=None if self.rows is None else self.rows[image],
            added=self.added,
            soft=self.soft,
        )
        if self.valid is None:
            return pick
        valid = self.valid[image]
        mixing = None if pick.mixing is None else pick.mixing.only(valid)
        rows = None if pick.rows is None else pick.rows[valid]
        return replace(pick, anchors=pick.anchors[valid], mixing=mixing, rows=rows)

    def to(self, device: Any) -> Reduction:
        """Copy the tensors to a device."""
        tensors = {name: getattr(self, name) for name in ("anchors", "mixing", "valid", "scores", "rows")}
        return replace(self, **{name: t.to(device) for name, t in tensors.items() if t is not None})

    # -- applying -----------------------------------------------------------------------------------------------------

    def apply(self, rows: Tensor) -> Tensor:
        """Return ``W @ rows``, `[N, D]` to `[K, D]` (or batched), in the dtype of ``rows``; sums run in float32.

        Registers get zero rows.

        Raises:
            Refusal: for another number of rows, or if a net made the rows: it cannot be applied again from here.
        """
        if self.rows is not None:
            raise Refusal("a net made the rows of this Reduction, which it holds: they do not follow from other rows")
        if rows.shape[-2] != self.total:
            raise Refusal(f"this Reduction is for {self.total} tokens; got {rows.shape[-2]} rows")
        if self.whole or self.soft:
            return rows
        if self.mixing is not None:
            kept = self.mixing.apply(rows, self.anchors.shape[-1])
        else:
            kept = rows.gather(-2, self.anchors[..., None].expand(*self.anchors.shape, rows.shape[-1]))
        return pad(kept, (0, 0, 0, self.added))

    def matrix(self) -> Tensor:
        """Return W as a dense float32 tensor `[K, N]` or `[B, K, N]`, for tests and plots."""
        if self.mixing is not None:
            w = self.mixing.dense(self.anchors.shape[-1], self.total)
        else:
            ones = torch.ones_like(self.anchors) if self.valid is None else self.valid
            zeros = torch.zeros((*self.anchors.shape, self.total), device=self.anchors.device)
            w = zeros.scatter(-1, self.anchors[..., None], ones.to(zeros.dtype)[..., None])
        return pad(w, (0, 0, 0, self.added))

    def after(self, first: Reduction) -> Reduction:
        """Compose ``first`` and then this decision into one (W = W_this · W_first); both of one image."""
        if first.slots != self.total:
            raise Refusal(f"stages do not fit: {first.slots} tokens leave the first, the second expects {self.total}")
        if self.anchors.ndim != 1 or first.anchors.ndim != 1:
            raise Refusal("compose Reductions of single images: index the batched ones first")
        if first.whole:
            return replace(self, grid=first.grid or self.grid, notes=first.notes + self.notes)
        mixing = None if self.mixing is None and first.mixing is None else self.entries().after(first.entries())
        rows = self.rows if self.rows is not None or first.rows is None else self.apply(first.rows)
        anchors, added = self.anchors, self.added
        if first.added:  # registers stand last, so they stay last
            anchors = anchors[anchors < len(first.anchors)]
            added += len(self.anchors) - len(anchors)
        return Reduction(
            first.total,
            first.anchors[anchors],
            mixing,
            grid=first.grid or self.grid,
            notes=first.notes + self.notes,
            projected=self.projected and first.projected,
            rows=rows,
            added=added,
        )

    def entries(self) -> Mixing:
        """Return the entries of W for one image, also for pure pruning."""
        if self.mixing is not None:
            return self.mixing
        slot = torch.arange(self.anchors.shape[-1], device=self.anchors.device)
        return Mixing(slot, self.anchors, torch.ones_like(slot, dtype=torch.float32))

    # -- storing ------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Convert to lists and numbers, without the scores and rows made by a net; :meth:`from_json` reads them.

        A decision without its made rows can be drawn, but not replayed.
        """
        return storing.to_json(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Reduction:
        """Read the result of :meth:`to_json`; raise :class:`Refusal` if it is something else."""
        read = cls(**storing.from_json(data))
        fault = read.fault()
        if fault is not None:
            raise Refusal(f"this is not the JSON of Reduction.to_json: {fault}")
        return read

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, including the scores and rows made by a net."""
        storing.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Reduction:
        """Read a file that :meth:`save` wrote; raise :class:`Refusal` if it is another file."""
        read = cls(**storing.load(path))
        fault = read.fault()
        if fault is not None:
            raise Refusal(f"{path} is not a file of Reduction.save: {fault}")
        return read
