"""What a method sees: the visual tokens of B equal images, and only the evidence it asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from tokensieve.budget import Budget, count
from tokensieve.errors import Refusal
from tokensieve.ops import padded_nonzero
from tokensieve.reduction import Mixing, Reduction

Layers: TypeAlias = int | slice | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The visual tokens of B images of equal size N, with the evidence a method needs to choose among them.

    Attributes:
        features: `[B, N, D]`, the rows that would enter the LLM (after the projector).
        grid: (height, width) with height · width = N, if the tokens form one.
        frames: T, where the images are videos: the tokens are those of T equal frames, one frame after the other, and
            the grid is the frames' grids one below the other.
        places: `[B, N, 2]`, row and column of each token in its image, if its tokens once formed a grid.
        cls_attention: {encoder layer: `[B, N]`}, what the encoder's [CLS] token attends to: post-softmax, mean over
            heads, one value per visual token. Layers count from 0.
        cls_similarity: `[B, N]`, cosine of each token's patch to the [CLS] token in what the encoder puts out.
        cls_wide: the same with the heads side by side as a single one: one softmax over their full width.
        received: {encoder layer: `[B, N]`}, what each token gets of all attention: mean over heads and queries.
        encoder_keys: {encoder layer: `[B, N, H, E]`}, keys as the encoder's attention sees them.
        patches: `[B, N, C]`, the encoder's rows as they enter the projector.
        joint, joint_text: `[B, N, E]` and `[B, M, E]`, tokens and prompt in a space that image and text encoder share.
        padding: `[B, N]` bool, True on patches that show nothing but padding of the picture. For callers who know
            them: ``attach`` does not, since no processor tells the model.
        tile: `[B, N]`, where an image is shown whole and then in tiles: 0 on the whole image, which comes first, then
            the number of each token's tile.
        tiles: how many tiles there are.
        views: (height, width) of the whole image's tokens and of the mosaic that the tiles form.
        depth: number of encoder layers, for negative layer numbers; by default the largest layer given plus one. In
            the LLM, its number of blocks.
        text: `[B, M, D]`, the user's words in the space of the features: at the connector, the LLM's input embeddings.
        text_mask: `[B, M]` bool, True on real words.
        queries: `[B, H, Q, N]`, in the LLM: post-softmax attention of the last token, or of each word, to the tokens.
        keys, text_keys: `[B, N, E]` and `[B, M, E]`, in the LLM: key states with heads side by side.
        before, middle: `[B, N, D]`, in the LLM: what entered the block before, and what its MLP was given.
        ranked: `[B, N]`, in the LLM: what the connector method ranked the tokens by, if it did.
        rotary, text_rotary: `[B, N, d]` and `[B, M, d]`, in the LLM: a vector of ones, turned by the rotary embedding.
        entry, text_entry: `[B, N0, D]` and `[B, M, D]`, in the LLM: embeddings as they entered it.
        sizes: `[B, N]` float32, inside the encoder: how many patches each token stands for.
        specials: inside the encoder, rows such as [CLS] that stand before the tokens and never leave.
        stage, stages: in encoder and LLM, which of the method's stages this is, from 0; in the encoder, of how many.
        entered: visual tokens of the image at the first layer or block; budgets of such methods are shares of these.
        notes: remarks on the evidence (a substitute for a missing [CLS], say); they travel into the Reduction.
    """

    features: Tensor
    grid: tuple[int, int] | None = None
    frames: int | None = None
    places: Tensor | None = None
    cls_attention: Mapping[int, Tensor] = field(default_factory=dict)
    cls_similarity: Tensor | None = None
    cls_wide: Mapping[int, Tensor] = field(default_factory=dict)
    received: Mapping[int, Tensor] = field(default_factory=dict)
    encoder_keys: Mapping[int, Tensor] = field(default_factory=dict)
    patches: Tensor | None = None
    joint: Tensor | None = None
    joint_text: Tensor | None = None
    padding: Tensor | None = None
    tile: Tensor | None = None
    tiles: int = 0
    views: tuple[tuple[int, int], ...] = ()
    depth: int | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    text_keys: Tensor | None = None
    before: Tensor | None = None
    middle: Tensor | None = None
    ranked: Tensor | None = None
    rotary: Tensor | None = None
    text_rotary: Tensor | None = None
    entry: Tensor | None = None
    text_entry: Tensor | None = None
    sizes: Tensor | None = None
    specials: int = 0
    stage: int = 0
    stages: int = 1
    entered: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.features.ndim != 3:
            raise Refusal(f"features must be [B, N, D]; got shape {list(self.features.shape)}")
        b, n, _ = self.features.shape
        if self.grid is not None and self.grid[0] * self.grid[1] != n:
            raise Refusal(f"a grid of {self.grid[0]}x{self.grid[1]} does not hold {n} tokens")
        if self.frames is not None and n % self.frames:
            raise Refusal(f"{n} tokens are not {self.frames} frames of equal size")
        for name in ("cls_attention", "cls_wide", "received", "encoder_keys"):
            for layer, rows in getattr(self, name).items():
                if rows.shape[:2] != (b, n):
                    raise Refusal(f"{name}[{layer}] must be [{b}, {n}]; got {list(rows.shape[:2])}")
        for name in ("patches", "joint", "padding", "tile"):
            rows = getattr(self, name)
            if rows is not None and rows.shape[:2] != (b, n):
                raise Refusal(f"{name} must start with [{b}, {n}]; got {list(rows.shape)}")
        if self.text is not None and (self.text.ndim != 3 or self.text.shape[0] != b):
            raise Refusal(f"text must be [{b}, M, D]; got shape {list(self.text.shape)}")
        if self.text is not None and self.text_mask is not None and self.text_mask.shape != self.text.shape[:2]:
            raise Refusal(f"text_mask must be {list(self.text.shape[:2])}; got {list(self.text_mask.shape)}")

    @property
    def total(self) -> int:
        """N, the tokens of each image."""
        return self.features.shape[1]

    def count(self, keep: Budget) -> int:
        """Tokens that the budget leaves of each image."""
        return min(count(keep, self.entered or self.total), self.total)

    def cls_rows(self, layers: Layers) -> Tensor:
        """Attention of [CLS] in the given encoder layers, `[S, B, N]` float32.

        Args:
            layers: one layer (negative counts from the last), several, or a slice, with Python's meaning.

        Raises:
            ValueError: if a layer was not given, or the slice is empty.
        """
        depth = self.depth or max(self.cls_attention, default=-1) + 1
        wanted = resolve_layers(layers, depth)
        missing = [layer for layer in wanted if layer not in self.cls_attention]
        if missing:
            raise Refusal(f"no [CLS] attention of encoder layers {missing}; given: {sorted(self.cls_attention)}")
        return torch.stack([self.cls_attention[layer] for layer in wanted]).float()

    def at(self, name: str, layer: int) -> Tensor:
        """Evidence ``name`` (``cls_attention``, ``received``…) of one encoder layer, float32; −1 is the last layer.

        Raises:
            ValueError: if it was not given.
        """
        given: Mapping[int, Tensor] = getattr(self, name)
        (wanted,) = resolve_layers(layer, self.depth or max(given, default=-1) + 1)
        if wanted not in given:
            raise Refusal(f"no {name} of encoder layer {wanted}; given: {sorted(given)}")
        return given[wanted].float()

    def given(self, name: str) -> Tensor:
        """Evidence that a method cannot do without; ``ValueError`` naming it if it was not given."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            if name == "places":
                raise Refusal(
                    "this method goes by places on one grid, which an image that is seen in several tiles does not "
                    "have: take a method that needs no grid"
                )
            raise Refusal(f"this method needs VisualTokens({name}=...)")
        return value

    def in_frames(self, rows: Tensor) -> Tensor:
        """Rows `[B, N, ...]` of videos frame by frame, `[B, T, n, ...]`; ``ValueError`` if these are images."""
        if self.frames is None:
            raise Refusal("this method compares the frames of a video; these tokens are of images")
        return rows.reshape(len(rows), self.frames, -1, *rows.shape[2:])

    def noted(self, note: str) -> VisualTokens:
        """The same with one more remark for the Reduction."""
        return replace(self, notes=(*self.notes, note))

    def words(self) -> tuple[Tensor, Tensor]:
        """The user's words and their mask, `[B, M, D]` and `[B, M]`.

        Raises:
            ValueError: if no text was given.
        """
        if self.text is None:
            raise Refusal("this method reads the prompt: give VisualTokens(text=[B, M, D])")
        mask = self.text_mask
        if mask is None:
            mask = torch.ones(self.text.shape[:2], dtype=torch.bool, device=self.text.device)
        return self.text, mask.bool()

    def keep(
        self,
        indices: Tensor,
        scores: Tensor | None = None,
        counts: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Reduction:
        """Keep the tokens at ``indices`` `[B, K]` (distinct, any order) and drop the others.

        Args:
            scores: `[B, N]`, what the method ranked by.
            counts: `[B]`, where images keep different numbers: how many of the first of its indices each one keeps.
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
        """Merge: entry e adds ``weight[e] * token[source[e]]`` to the slot that stands at ``anchors[slot[e]]``.

        Args:
            anchors: `[B, K]`, distinct, any order.
            slot, source, weight: `[B, E]`.
            notes: anything a reader of this decision must know.
            valid, scores: as in :meth:`keep`; entries of padded slots must have weight 0.
            before_projector: merge the rows that enter the projector; the method must need ``patches``.
        """
        anchors, places, valid = _in_order(anchors, valid)
        slot = places.gather(-1, slot)
        if valid is not None:
            slot = slot.masked_fill(weight == 0, 0)
        mixing, notes = Mixing(slot, source, weight.float()), (*self.notes, *notes)
        projected = not before_projector
        return Reduction(self.total, anchors, mixing, valid, scores, self.grid, notes, projected)

    def merge_into(self, into: Tensor, weight: Tensor, *notes: str, scores: Tensor | None = None) -> Reduction:
        """Every token goes into one: token i adds ``weight[i]`` of itself to token ``into[i]``.

        Args:
            into: `[B, N]`; a token that goes into itself stays, −1 is dropped.
            weight: `[B, N]`.
            notes, scores: as in :meth:`merge`.
        """
        source = torch.arange(self.total, device=into.device).expand_as(into)
        stays, lost = into == source, into < 0
        anchors, valid = padded_nonzero(stays)
        slot = (stays.long().cumsum(-1) - 1).gather(-1, into.clamp(min=0)).masked_fill(lost, 0)
        mixing = Mixing(slot, source, weight.float().masked_fill(lost, 0))
        real = None if bool(valid.all()) else valid
        return Reduction(self.total, anchors, mixing, real, scores, self.grid, (*self.notes, *notes))


def _in_order(anchors: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Anchors ascending, where each went, and which slots are real: padding comes last and repeats the last anchor."""
    if valid is None:
        ordered, order = anchors.sort(-1)
        return ordered, order.argsort(-1), None
    last = anchors.where(valid, 0).amax(-1, keepdim=True)
    order = anchors.masked_fill(~valid, torch.iinfo(anchors.dtype).max).argsort(-1)
    valid = valid.gather(-1, order)
    return anchors.gather(-1, order).where(valid, last), order.argsort(-1), valid


def resolve_layers(layers: Layers, depth: int) -> list[int]:
    """Layer numbers 0 … depth−1 meant by an int, several, or a slice; ``ValueError`` if there is none."""
    every = list(range(depth))
    try:
        wanted = [every[layer] for layer in layers] if isinstance(layers, tuple) else every[layers]
    except IndexError:
        raise Refusal(f"the encoder has layers 0 to {depth - 1}; got {layers}") from None
    wanted = [wanted] if isinstance(wanted, int) else wanted
    if not wanted:
        assert isinstance(layers, slice)
        raise Refusal(f"no encoder layer in {layers.start}:{layers.stop}; the encoder has layers 0 to {depth - 1}")
    return wanted
