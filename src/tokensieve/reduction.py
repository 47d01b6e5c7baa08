"""A reduction: which visual tokens are kept, and which tokens are merged into them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokensieve.errors import Refusal

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
        m = self.mixing
        # [N]: each token's largest weight; entries that reach it and are no padding name its slot
        weight = m.weight.new_zeros((*m.source.shape[:-1], self.total)).scatter_reduce(-1, m.source, m.weight, "amax")
        best = (m.weight == weight.gather(-1, m.source)) & (m.weight > 0)
        slot = m.slot.masked_fill(~best, -1)
        return slot.new_full(weight.shape, -1).scatter_reduce(-1, m.source, slot, "amax")

    @property
    def counts(self) -> Tensor:
        """Return the number of original tokens in each slot, `[K]` or `[B, K]`; 0 for registers."""
        m = self.mixing
        if m is not None:
            counts = torch.zeros_like(self.anchors).scatter_add(-1, m.slot, (m.weight != 0).long())
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
        m = self.mixing
        return pad(m.weight.new_zeros(self.anchors.shape).scatter_add(-1, m.slot, m.weight), (0, self.added))

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
            self.mixing and Mixing(*(t[image] for t in (self.mixing.slot, self.mixing.source, self.mixing.weight))),
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
        valid, m = self.valid[image], pick.mixing
        if m is not None:  # drop the entries of padded slots and renumber the others
            entries, number = valid[m.slot], valid.cumsum(0) - 1
            m = Mixing(number[m.slot[entries]], m.source[entries], m.weight[entries])
        return replace(
            pick, anchors=pick.anchors[valid], mixing=m, rows=None if pick.rows is None else pick.rows[valid]
        )

    def to(self, device: Any) -> Reduction:
        """Copy the tensors to a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        m = self.mixing
        mixing = None if m is None else Mixing(*(t.to(device) for t in (m.slot, m.source, m.weight)))
        anchors, valid, scores = self.anchors.to(device), moved(self.valid), moved(self.scores)
        return replace(self, anchors=anchors, mixing=mixing, valid=valid, scores=scores, rows=moved(self.rows))

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
        width = rows.shape[-1]
        if self.mixing is None:
            kept = rows.gather(-2, self.anchors[..., None].expand(*self.anchors.shape, width))
            return pad(kept, (0, 0, 0, self.added))
        out = torch.zeros((*self.anchors.shape, width), device=rows.device)
        entries = (torch.split(t, ENTRIES, dim=-1) for t in (self.mixing.slot, self.mixing.source, self.mixing.weight))
        for slot, source, weight in zip(*entries, strict=True):
            parts = rows.gather(-2, source[..., None].expand(*source.shape, width)).float() * weight[..., None]
            out = out.scatter_add(-2, slot[..., None].expand_as(parts), parts)
        return pad(out.to(rows.dtype), (0, 0, 0, self.added))

    def matrix(self) -> Tensor:
        """Return W as a dense float32 tensor `[K, N]` or `[B, K, N]`, for tests and plots."""
        w = torch.zeros((*self.anchors.shape, self.total), device=self.anchors.device)
        if self.mixing is None:
            ones = torch.ones_like(self.anchors, dtype=w.dtype) if self.valid is None else self.valid.to(w.dtype)
            return pad(w.scatter(-1, self.anchors[..., None], ones[..., None]), (0, 0, 0, self.added))
        m = self.mixing
        # entry (slot, source) of a row-major [K, N] matrix is at slot · N + source
        flat = w.flatten(-2).scatter_add(-1, m.slot * self.total + m.source, m.weight)
        return pad(flat.view_as(w), (0, 0, 0, self.added))

    def after(self, first: Reduction) -> Reduction:
        """Compose ``first`` and then this decision into one (W = W_this · W_first); both of one image."""
        if first.slots != self.total:
            raise Refusal(f"stages do not fit: {first.slots} tokens leave the first, the second expects {self.total}")
        if self.anchors.ndim != 1 or first.anchors.ndim != 1:
            raise Refusal("compose Reductions of single images: index the batched ones first")
        if first.whole:
            return replace(self, grid=first.grid or self.grid, notes=first.notes + self.notes)
        mixing = None if self.mixing is None and first.mixing is None else _product(self.entries(), first.entries())
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
        out: dict[str, Any] = {"total": self.total, "anchors": self.anchors.tolist()}
        if self.mixing is not None:
            out["mixing"] = {k: getattr(self.mixing, k).tolist() for k in ("slot", "source", "weight")}
        if self.valid is not None:
            out["valid"] = self.valid.tolist()
        if self.grid is not None:
            out["grid"] = list(self.grid)
        if self.notes:
            out["notes"] = list(self.notes)
        if not self.projected:
            out["projected"] = False
        if self.rows is not None:
            out["made"] = True
        if self.added:
            out["added"] = self.added
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Reduction:
        """Read the result of :meth:`to_json`; raise :class:`Refusal` if it is something else."""
        try:
            mixing, anchors = data.get("mixing"), torch.tensor(data["anchors"], dtype=torch.int64)
            read = cls(
                total=int(data["total"]),
                anchors=anchors,
                mixing=mixing
                and Mixing(
                    torch.tensor(mixing["slot"], dtype=torch.int64),
                    torch.tensor(mixing["source"], dtype=torch.int64),
                    torch.tensor(mixing["weight"], dtype=torch.float32),
                ),
                valid=torch.tensor(data["valid"], dtype=torch.bool) if "valid" in data else None,
                grid=(data["grid"][0], data["grid"][1]) if "grid" in data else None,
                notes=tuple(data.get("notes", ())),
                projected=data.get("projected", True),
                rows=torch.empty(*anchors.shape, 0) if data.get("made") else None,
                added=int(data.get("added", 0)),
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise Refusal(f"this is not the JSON of Reduction.to_json ({detail})") from error
        fault = read.fault()
        if fault is not None:
            raise Refusal(f"this is not the JSON of Reduction.to_json: {fault}")
        return read

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, including the scores and rows made by a net."""
        from safetensors.torch import save_file  # here: torch alone suffices for everything else

        tensors = {"anchors": self.anchors, "valid": self.valid, "scores": self.scores, "rows": self.rows}
        if self.mixing is not None:
            tensors |= {"slot": self.mixing.slot, "source": self.mixing.source, "weight": self.mixing.weight}
        named = {name: getattr(self, name) for name in ("total", "grid", "notes", "projected", "added")}
        meta = {name: json.dumps(value) for name, value in named.items()}
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items() if v is not None}, path, metadata=meta)

    @classmethod
    def load(cls, path: str | Path) -> Reduction:
        """Read a file that :meth:`save` wrote; raise :class:`Refusal` if it is another file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as f:
                tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118 (not a dict)
        except OSError as error:
            raise Refusal(f"{path} cannot be read ({error.strerror or error})") from None
        except SafetensorError:
            raise Refusal(f"{path} is not a file of Reduction.save: not in the safetensors format") from None
        if "anchors" not in tensors or "total" not in meta:
            raise Refusal(f"{path} is not a file of Reduction.save: it holds other tensors")
        try:
            grid = json.loads(meta["grid"])
            read = cls(
                total=int(meta["total"]),
                anchors=tensors["anchors"],
                mixing=Mixing(*(tensors[k] for k in ("slot", "source", "weight"))) if "slot" in tensors else None,
                valid=tensors.get("valid"),
                scores=tensors.get("scores"),
                grid=grid and (grid[0], grid[1]),
                notes=tuple(json.loads(meta["notes"])),
                projected=json.loads(meta.get("projected", "true")),
                rows=tensors.get("rows"),
                added=int(json.loads(meta.get("added", "0"))),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Refusal(f"{path} is not a file of Reduction.save: {type(error).__name__}: {error}") from error
        fault = read.fault()
        if fault is not None:
            raise Refusal(f"{path} is not a file of Reduction.save: {fault}")
        return read


def _product(second: Mixing, first: Mixing) -> Mixing:
    """Multiply W_second · W_first; return one entry for each pair of slot and source, sorted."""
    # an inner join: each entry of `second` meets all entries of `first` whose slot is its source
    order = first.slot.argsort(stable=True)  # groups the entries of `first` by slot
    count = torch.bincount(first.slot, minlength=int(second.source.max()) + 1 if second.source.numel() else 0)
    start, repeats = count.cumsum(0) - count, count[second.source]
    # left, right: the entries of `second` and of `first` in each joined pair
    left = torch.arange(len(second.slot), device=order.device).repeat_interleave(repeats)
    place_in_group = torch.arange(len(left), device=order.device) - (repeats.cumsum(0) - repeats)[left]
    right = order[start[second.source[left]] + place_in_group]
    pairs = torch.stack([second.slot[left], first.source[right]])
    (slot, source), entry_of_pair = torch.unique(pairs, dim=1, return_inverse=True)  # adds up several paths
    weight = torch.zeros(slot.shape, device=slot.device)
    return Mixing(slot, source, weight.index_add(0, entry_of_pair, second.weight[left] * first.weight[right]))
