"""Images as a base tile and an unpadded mosaic of tiles, with a newline token after each line of the mosaic."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from tokensieve.models.family import EncodeCall, Family
from tokensieve.models.layout import TokenLayout


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
        numbers = torch.arange(sum(tiles) * height * width, dtype=torch.float64)
        # the packed features are the number and the square of each unit: see _layout; newlines are -1
        index = torch.stack([numbers, numbers**2], -1).view(-1, height * width, 2)
        packed = self.pack(model, call, list(torch.split(index, tiles)), torch.tensor([-1.0, 1.0], dtype=torch.float64))
        return [self._layout((height, width), count - 1, rows) for count, rows in zip(tiles, packed, strict=True)]

    def _layout(self, base: tuple[int, int], tiles: int, rows: Tensor) -> TokenLayout:
        """Read an image's layout from its packed index ``rows`` `[N, 2]`: number and square of units, -1 newlines."""
        separator, base_size = rows[:, 0] < 0, base[0] * base[1]
        # the newlines before a token are the number of its line: a newline itself belongs to the line that it ends
        line, views = separator.long().cumsum(0) - separator.long(), [base]
        if tiles:
            line[base_size:] += 1  # the base tile has no newline: its tokens are line 0
            newlines = int(separator.sum())
            views.append((newlines, (len(rows) - base_size) // newlines - 1))
        patch_index = (~separator).nonzero().squeeze(-1)
        units = rows[patch_index]
        # the packing may interpolate: then a row is a mean of units, whose square is not the mean of their squares
        mapped = bool((units[:, 0] ** 2 == units[:, 1]).all())
        if not mapped:
            return TokenLayout(len(rows), tuple(views), None, line, patch_index, mapped=False)
        number = units[:, 0].long()
        tile = number // base_size - number[0] // base_size if tiles else None
        return TokenLayout(len(rows), tuple(views), number, line, patch_index, tile, tiles)
