"""Images as a base tile and an unpadded mosaic of tiles, with a newline token after each line of the mosaic."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tokensieve.models.family import EncodeCall, Family
from tokensieve.models.layout import Grid, TokenLayout

NEWLINE = torch.tensor([-1.0, 1.0], dtype=torch.float64)
"""Stands for a newline in an index of units."""


class AnyResolution(Family):
    """The LLaVA-NeXT line. The model's own packing runs on an index, which shows where each unit goes."""

    def tiles(self, model: Any, call: EncodeCall) -> list[int]:
        """Return the number of tiles of each image, including the base tile."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        pinpoints, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
        return [image_size_to_num_patches(size, pinpoints, side) for size in call.sizes]

    @abstractmethod
    def pack(self, model: Any, call: EncodeCall, rows: list[Tensor], newline: Tensor) -> list[Tensor]:
        """Run the model's own packing, `[tiles, P, C]` to `[N, C]` for each image."""

    def layouts(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        (height, width), tiles = self.tile(model, call), self.tiles(model, call)
        index = _index(sum(tiles) * height * width).view(-1, height * width, 2)
        packed = self.pack(model, call, list(torch.split(index, tiles)), NEWLINE)
        return [_layout((height, width), count - 1, rows) for count, rows in zip(tiles, packed, strict=True)]


def layout_of_size(
    size: Sequence[int], pinpoints: list[list[int]], tile: int, side: int, most_tiles: int | None = None
) -> TokenLayout:
    """Return the layout of an image of ``size`` (height, width) in pixels, without a model. Its first unit is 0.

    Args:
        pinpoints: (height, width) in pixels of the mosaics that the model allows.
        tile: side of a tile in pixels.
        side: side of a tile in patches.
        most_tiles: a mosaic of more than 1.21 times the patches of so many tiles is resampled; ``None``: none is.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    down, across = get_anyres_image_grid_shape(tuple(size), pinpoints, tile)
    index = _index((1 + down * across) * side * side).T
    whole, tiles = index[:, : side * side], index[:, side * side :].reshape(2, down, across, side, side)
    # [2, down, across, side, side]: the two heights, and the two widths, must be neighbours before they are flattened
    mosaic = tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    mosaic = unpad_image(mosaic, tuple(size))
    height, width = mosaic.shape[1:]
    ratio = 0.0 if most_tiles is None else math.sqrt(height * width / (most_tiles * side**2))
    if ratio > 1.1:
        mosaic = interpolate(mosaic[None], [int(height // ratio), int(width // ratio)], mode="bilinear")[0]
    newlines = NEWLINE[:, None, None].expand(2, mosaic.shape[1], 1)
    rows = torch.cat([whole, torch.cat([mosaic, newlines], -1).flatten(1)], 1).T
    return _layout((side, side), down * across, rows)


def _index(units: int) -> Tensor:
    """Return the number of each unit and its square, `[units, 2]`: features whose packing shows the layout."""
    numbers = torch.arange(units, dtype=torch.float64)
    return torch.stack([numbers, numbers**2], -1)


def _layout(base: Grid, tiles: int, rows: Tensor) -> TokenLayout:
    """Read an image's layout from its packed index ``rows`` `[N, 2]`: number and square of units, -1 newlines."""
    separator, base_size = rows[:, 0] < 0, base[0] * base[1]
    # the newlines before a token are the number of its line: a newline itself belongs to the line that it ends
    line, views = separator.long().cumsum(0) - separator.long(), [base]
    if tiles:
        line[base_size:] += 1  # the base tile has no newline: its tokens are line 0
    newlines = int(separator.sum())
    in_mosaic = len(rows) - base_size - newlines
    if in_mosaic:
        views.append((newlines, in_mosaic // newlines))
    else:  # one tile; or so long and thin an image that unpadding leaves no patch of its tiles
        tiles = 0
    patch_index = (~separator).nonzero().squeeze(-1)
    units = rows[patch_index]
    # the packing may interpolate: then a row is a mean of units, whose square is not the mean of their squares
    mapped = bool((units[:, 0] ** 2 == units[:, 1]).all())
    if not mapped:
        return TokenLayout(len(rows), tuple(views), None, line, patch_index, mapped=False)
    number = units[:, 0].long()
    tile = number // base_size - number[0] // base_size if tiles else None
    return TokenLayout(len(rows), tuple(views), number, line, patch_index, tile, tiles)
