"""The types of evidence: rows by layer, the user's words, and the tiles of an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from tokensieve.errors import Refusal

Layers: TypeAlias = int | float | slice | tuple[int | float, ...]
T = TypeVar("T")


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

    @classmethod
    def stacked(cls, images: Sequence[ByLayer]) -> ByLayer:
        """Return the evidence `[B, N, ...]` of equal images from that of each, `[N, ...]`."""
        return cls({layer: torch.stack([image[layer] for image in images]) for layer in images[0]}, images[0].depth)

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


def given(evidence: T | None) -> T:
    """Return evidence that the method requested.

    Raises:
        TypeError: if the tokens come without it, because the method's needs do not name it.
    """
    if evidence is None:
        raise TypeError("the method reads evidence that the tokens come without: request it in the method's needs")
    return evidence


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
        requested = f"{layers.start}:{layers.stop}" if isinstance(layers, slice) else layers
        raise Refusal(f"no encoder layer in {requested}; the encoder has layers 0 to {depth - 1}")
    return chosen


def _layer_number(layer: int | float, depth: int) -> int:
    """Return the number of a layer; a float up to 1 is a share of the depth, and 1.0 is the last layer."""
    return layer if isinstance(layer, int) else min(round(layer * depth), depth - 1 if layer <= 1 else depth)
