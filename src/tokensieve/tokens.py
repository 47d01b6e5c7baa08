"""The tokens that a method receives: B images of equal size, and only the evidence that the method requested.

Each stage has a type of its own. :class:`ConnectorTokens` are about to enter the LLM, :class:`EncoderTokens` are inside
the vision encoder, and :class:`DecoderTokens` are inside the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from tokensieve.errors import Refusal
from tokensieve.ops import padded_nonzero
from tokensieve.reduction import Mixing, Reduction

Layers: TypeAlias = int | float | slice | tuple[int | float, ...]
T = TypeVar("T")
AnyTokens = TypeVar("AnyTokens", bound="VisualTokens")


class ByLayer(Mapping[int, Tensor]):
    """Evidence by layer of the vision encoder. Negative layers count from the last; a float is a share of the depth.

    Args:
        rows: {layer: `[B, N, ...]`}.
        depth: number of layers; by default the largest layer in ``rows`` plus one.
    """

    def __init__(self, rows: Mapping[int, Tensor] | None = None, depth: int | None = None) -> None:
        self._rows = dict(rows or {})
        self.depth = max(self._rows, default=-1) + 1 if depth is None else depth

    def __getitem__(self, layer: int | float) -> Tensor:
        """Return the evidence of one layer, float32; ``KeyError`` if it was not requested."""
        number = _layer_number(layer, self.depth)
        number = number + self.depth if number < 0 else number
        if number not in self._rows:
            raise KeyError(f"no evidence of encoder layer {layer}; requested: {sorted(self._rows)} of {self.depth}")
        return self._rows[number].float()

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def stack(self, layers: Layers) -> Tensor:
        """Return the evidence of several layers, `[S, B, N, ...]` float32; raises as :func:`resolve_layers`."""
        return torch.stack([self[layer] for layer in resolve_layers(layers, self.depth)])


@dataclass(frozen=True, eq=False)
class UserText:
    """The user's words in the prompts of B images; M words in the longest prompt.

    Attributes:
        features: `[B, M, D]`, in the space of the images' features: the LLM's input embeddings at the connector, hidden
            states inside the LLM.
        mask: `[B, M]` bool, False on padding.
    """

    features: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.mask.shape != self.features.shape[:2]:
            raise ValueError(f"mask must be {list(self.features.shape[:2])}; got shape {list(self.mask.shape)}")


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderUserText(UserText):
    """The user's words inside the LLM.

    Attributes:
        keys: `[B, M, E]`, as ``DecoderTokens.keys``.
        input_embeddings: `[B, M, D]`, the rows that entered the LLM.
        rope_gain: `[B, M, d]`, as ``DecoderTokens.rope_gain``.
    """

    keys: Tensor | None = None
    input_embeddings: Tensor | None = None
    rope_gain: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of images that the vision encoder receives whole and then in tiles.

    Attributes:
        number: `[B, N]`, the tile of each token: 0 on the whole image, which comes first, then 1, 2, …
        count: the number of tiles.
        views: (height, width) in tokens of the whole image and of the mosaic that the tiles form.
    """

    number: Tensor
    count: int
    views: tuple[tuple[int, int], ...]


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


@dataclass(frozen=True, eq=False, kw_only=True)
class ConnectorTokens(VisualTokens):
    """Tokens that are about to enter the LLM: the projector's rows.

    Attributes:
        cls_attention: by encoder layer `[B, N]`, the attention of the [CLS] token: post-softmax, mean over heads.
        cls_attention_single_head: by encoder layer `[B, N]`, the same with all heads joined into one.
        attention_received: by encoder layer `[B, N]`, the attention that each token receives: mean over heads and
            queries.
        encoder_keys: by encoder layer `[B, N, H, E]`, the keys.
        encoder_states: by encoder layer `[B, N, C]`, the hidden states that leave it.
        cls_similarity: `[B, N]`, cosine of each patch to the [CLS] token in the vision encoder's output.
        patches: `[B, N, C]`, the rows that enter the projector.
        project: the projector, from rows `[R, C]` like the patches to rows `[R, D]` like the features.
        rows_beside: `[B, S, C]`, the rows of the net that have passed the vision encoder's layers beside the patches.
        pixel_hash: `[B]` int64, a number that depends on the image's pixels alone.
        user_text: the user's words, as the LLM's input embeddings.
        tiles: where the vision encoder received the image in tiles; else ``None``.
    """

    cls_attention: ByLayer = field(default_factory=ByLayer)
    cls_attention_single_head: ByLayer = field(default_factory=ByLayer)
    attention_received: ByLayer = field(default_factory=ByLayer)
    encoder_keys: ByLayer = field(default_factory=ByLayer)
    encoder_states: ByLayer = field(default_factory=ByLayer)
    cls_similarity: Tensor | None = None
    patches: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    rows_beside: Tensor | None = None
    pixel_hash: Tensor | None = None
    user_text: UserText | None = None
    tiles: Tiles | None = None

    other_shapes: ClassVar = ("pixel_hash", "rows_beside")


@dataclass(frozen=True, eq=False, kw_only=True)
class EncoderTokens(VisualTokens):
    """Tokens inside the vision encoder, with the evidence of the running layer.

    Attributes:
        sizes: `[B, N]` float32, the number of patches that each token stands for; ``None``: one each.
        specials: rows such as [CLS] that stand before the tokens and never leave.
        cls_attention, cls_attention_single_head, attention_received: `[B, N]`, as in :class:`ConnectorTokens`.
        encoder_keys, encoder_values: `[B, N, H, E]`.
        value_attention: `[B, N]`, the softmax of the products of the [CLS] token's value with all values, mean over
            heads; without [CLS], of every value, mean over them.
        earlier_scores: `[B, N]`, the scores of the method's last decision; ``None`` in the first of its layers.
        layers_to_come: later layers in which the method is called.
    """

    sizes: Tensor | None = None
    specials: int = 0
    cls_attention: Tensor | None = None
    cls_attention_single_head: Tensor | None = None
    attention_received: Tensor | None = None
    encoder_keys: Tensor | None = None
    encoder_values: Tensor | None = None
    value_attention: Tensor | None = None
    earlier_scores: Tensor | None = None
    layers_to_come: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderTokens(VisualTokens):
    """Tokens inside the LLM; ``features`` are the hidden states that enter the layer before which tokens leave.

    Attributes:
        coordinates: `[B, N, 2]`, row and column of each token in its image, if the tokens once formed one grid.
        entered: tokens of each image that entered the LLM; ``None``: N.
        layer: the number of the layer before which tokens leave.
        attention: `[B, H, Q, N]`, post-softmax attention of the last token, or of each word, to the tokens.
        separator_attention: `[B, H, N]`, post-softmax attention of the token that follows the image, to its tokens.
        gradient: `[B, N, D]`, of the cross-entropy of the layer's own guess to ``features``.
        keys: `[B, N, E]`, key states with the heads side by side.
        layer_input: `[B, N, D]`, the hidden states that entered the previous layer.
        mlp_input: `[B, N, D]`, the rows that entered the MLP of the previous layer.
        input_embeddings: `[B, N0, D]`, the rows that entered the LLM, of all N0 tokens that entered.
        rope_gain: `[B, N, d]`, a vector of ones, rotated by the rotary embedding at each token's position.
        connector_scores: `[B, N]`, the scores that the connector method ranked the tokens by, if it did.
        user_text: the hidden states of the user's words.
    """

    coordinates: Tensor | None = None
    entered: int | None = None
    layer: int = 0
    attention: Tensor | None = None
    separator_attention: Tensor | None = None
    gradient: Tensor | None = None
    keys: Tensor | None = None
    layer_input: Tensor | None = None
    mlp_input: Tensor | None = None
    input_embeddings: Tensor | None = None
    rope_gain: Tensor | None = None
    connector_scores: Tensor | None = None
    user_text: DecoderUserText | None = None

    other_shapes: ClassVar = ("attention", "separator_attention", "input_embeddings")


def given(evidence: T | None) -> T:
    """Return evidence that the method requested.

    Raises:
        TypeError: if the tokens come without it, because the method's needs do not name it.
    """
    if evidence is None:
        raise TypeError("the method reads evidence that the tokens come without: request it in the method's needs")
    return evidence


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


def resolve_layers(layers: Layers, depth: int) -> list[int]:
    """Return the layer numbers 0 … depth−1 meant by an int, several ints, or a slice, with Python's meaning.

    A float in the place of an int is a share of the depth: 0.35 of 24 layers is layer 8.

    Raises:
        Refusal: if the vision encoder has no such layer.
    """
    numbers = list(range(depth))
    try:
        if isinstance(layers, slice):
            chosen = numbers[layers]
        else:
            chosen = [numbers[_layer_number(n, depth)] for n in (layers if isinstance(layers, tuple) else (layers,))]
    except IndexError:
        raise Refusal(f"the encoder has layers 0 to {depth - 1}; got {layers}") from None
    if not chosen:
        assert isinstance(layers, slice)
        raise Refusal(f"no encoder layer in {layers.start}:{layers.stop}; the encoder has layers 0 to {depth - 1}")
    return chosen


def _layer_number(layer: int | float, depth: int) -> int:
    """Return the number of a layer; a float up to 1 is a share of the depth, and 1.0 is the last layer."""
    return layer if isinstance(layer, int) else min(round(layer * depth), depth - 1 if layer <= 1 else depth)
