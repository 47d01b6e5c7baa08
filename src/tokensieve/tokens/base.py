"""The base of all tokens: rows, a grid and a budget, and the functions that keep and merge them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from tokensieve.errors import Refusal
from tokensieve.ops import padded_nonzero
from tokensieve.reduction import Mixing, Reduction
from tokensieve.tokens.evidence import ByLayer, UserText

AnyTokens = TypeVar("AnyTokens", bound="VisualTokens")


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """B images of equal size: N tokens each. The base of the three types below.

    Attributes:
        features: `[B, N, D]`, the rows that the method chooses among.
        grid: (height, width) with height · width = N, if the tokens form a grid.
        frames: T, if the images are videos: the tokens of T equal frames, one frame after the other. The grid is then
            that of the frames, stacked vertically.
        budget: tokens to keep of each image, already worked out by the engine from ``keep`` or ``average``. 0: not
            worked out; a method that is called on its own then uses its ``keep``.
        notes: remarks on the evidence, such as a substitute for a missing [CLS]; copied into the Reduction.
        net: the net of a trained method, on the device of the features.
    """

    features: Tensor
    grid: tuple[int, int] | None = None
    frames: int | None = None
    budget: int = 0
    notes: tuple[str, ...] = ()
    net: nn.Module | None = None

    other_shapes: ClassVar[tuple[str, ...]] = ()  # evidence that is not `[B, N, ...]`

    def __post_init__(self) -> None:
        if self.features.ndim != 3:
            raise ValueError(f"features must be [B, N, D]; got shape {list(self.features.shape)}")
        n = self.total
        if self.grid is not None and self.grid[0] * self.grid[1] != n:
            raise ValueError(f"a grid of {self.grid[0]}x{self.grid[1]} does not hold {n} tokens")
        if self.frames is not None and n % self.frames:
            raise ValueError(f"{n} tokens are not {self.frames} frames of equal size")
        text: UserText | None = getattr(self, "user_text", None)
        if text is not None and len(text.features) != len(self.features):
            raise ValueError(f"user_text must be of {len(self.features)} images; got {len(text.features)}")
        for name in {f.name for f in fields(self)} - {*self.other_shapes}:
            evidence = getattr(self, name)
            for rows in evidence.values() if isinstance(evidence, ByLayer) else [evidence]:
                if isinstance(rows, Tensor) and rows.shape[:2] != (len(self.features), n):
                    raise ValueError(f"{name} must start with [{len(self.features)}, {n}]; got {list(rows.shape)}")

    @property
    def total(self) -> int:
        """N, the tokens of each image."""
        return self.features.shape[1]

    def in_frames(self, rows: Tensor) -> Tensor:
        """Reshape rows `[B, N, ...]` of videos to frames, `[B, T, n, ...]`.

        Raises:
            Refusal: if these are images.
        """
        if self.frames is None:
            raise Refusal("this method compares the frames of a video; these tokens are of images")
        return rows.reshape(len(rows), self.frames, -1, *rows.shape[2:])

    def noted(self: AnyTokens, note: str) -> AnyTokens:
        """Return the same tokens with one more remark for the Reduction."""
        return replace(self, notes=(*self.notes, note))

    def keep(
        self,
        indices: Tensor,
        scores: Tensor | None = None,
        counts: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Reduction:
        """Keep the tokens at ``indices`` `[B, K]` (distinct, any order) and drop the others.

        Args:
            scores: `[B, N]`, the scores that the method ranked by.
            counts: `[B]`, if images keep different numbers of tokens: image b keeps its first ``counts[b]`` indices.
            valid: `[B, K]` bool, the same as a mask: False on padding.
        """
        if counts is not None:
            indices = indices[:, : int(counts.max())]
            valid = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
        anchors, _, valid = _in_order(indices, valid)
        return Reduction(self.total, anchors, valid=valid, scores=scores, grid=self.grid, notes=self.notes)

    def merge(
        self,
        anchors: Tensor,
        slot: Tensor,
        source: Tensor,
        weight: Tensor,
        *notes: str,
        valid: Tensor | None = None,
        scores: Tensor | None = None,
        before_projector: bool = False,
    ) -> Reduction:
        """Merge tokens: entry e adds ``weight[e] * token[source[e]]`` to the slot that stands at ``anchors[slot[e]]``.

        Args:
            anchors: `[B, K]`, distinct, any order.
            slot, source, weight: `[B, E]`.
            notes: remarks for readers of this decision.
            valid, scores: as in :meth:`keep`; entries of padded slots must have weight 0.
            before_projector: merge the rows that enter the projector; the method must request ``patches``.
        """
        anchors, new_slot, valid = _in_order(anchors, valid)
        slot = new_slot.gather(-1, slot)  # a Reduction's slots ascend by anchor: renumber the entries accordingly
        if valid is not None:
            slot = slot.masked_fill(weight == 0, 0)  # padding entries must name a slot that exists in every image
        return Reduction(
            self.total,
            anchors,
            Mixing(slot, source, weight.float()),
            valid,
            scores,
            self.grid,
            (*self.notes, *notes),
            projected=not before_projector,
        )

    def made(
        self,
        rows: Tensor,
        anchors: Tensor,
        *notes: str,
        parts: Tensor | None = None,
        valid: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> Reduction:
        """Put rows that a net made into the place of the tokens; the method's class sets ``makes_rows``.

        Args:
            rows: `[B, K, D]`, in the space of the features.
            anchors: `[B, K]`, the tokens at whose places they stand; distinct, any order.
            notes: remarks for readers of this decision.
            parts: `[B, K, N]`, the share of each token in each row; ``None``: each is made of the token at its place.
            valid, scores: as in :meth:`keep`.
        """
        if parts is None:
            decision = self.keep(anchors, scores, valid=valid)
        else:  # only nonzero shares become entries: images with fewer of them get zeros as padding
            source, filled = padded_nonzero(parts.detach().flatten(1) != 0)
            weight = parts.detach().flatten(1).gather(-1, source) * filled
            slot, source = source // self.total, source % self.total
            decision = self.merge(anchors, slot, source, weight, valid=valid, scores=scores)
        order = _in_order(anchors, valid)[1].argsort(-1)  # the rows follow their anchors
        rows = rows.gather(-2, order[..., None].expand_as(rows)).to(self.features.dtype)
        return replace(decision, rows=rows, notes=(*self.notes, *notes))

    def merge_into(self, into: Tensor, weight: Tensor, *notes: str, scores: Tensor | None = None) -> Reduction:
        """Merge every token into one token: token i adds ``weight[i]`` of itself to token ``into[i]``.

        Args:
            into: `[B, N]`; a token that merges into itself stays, −1 drops the token.
            weight: `[B, N]`.
            notes, scores: as in :meth:`merge`.
        """
        source = torch.arange(self.total, device=into.device).expand_as(into)
        stays, dropped = into == source, into < 0
        anchors, valid = padded_nonzero(stays)
        # the slot of a token that stays is the number of staying tokens before it
        slot = (stays.long().cumsum(-1) - 1).gather(-1, into.clamp(min=0)).masked_fill(dropped, 0)
        mixing = Mixing(slot, source, weight.float().masked_fill(dropped, 0))
        valid_or_none = None if bool(valid.all()) else valid
        return Reduction(self.total, anchors, mixing, valid_or_none, scores, self.grid, (*self.notes, *notes))


def _in_order(anchors: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sort the anchors: returns them ascending, the new slot of each old one, and the valid slots.

    Padding comes last and repeats the last anchor.
    """
    if valid is None or not anchors.shape[-1]:  # without slots there is no padding
        ordered, order = anchors.sort(-1)
        return ordered, order.argsort(-1), None  # argsort of a permutation is its inverse
    last = anchors.where(valid, 0).amax(-1, keepdim=True)
    # padding sorts behind every real anchor
    order = anchors.masked_fill(~valid, torch.iinfo(anchors.dtype).max).argsort(-1)
    valid = valid.gather(-1, order)
    return anchors.gather(-1, order).where(valid, last), order.argsort(-1), valid
