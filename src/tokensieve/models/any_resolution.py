"""Images as a base tile and a mosaic of tiles, unpadded, every row of the mosaic ended by a newline row."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from tokensieve.models.family import EncodeCall, Family
from tokensieve.models.layout import TokenLayout


class AnyResolution(Family):
    """What the LLaVA-NeXT line has in common: the model itself packs an index, and so tells where its rows go."""

    def tiles(self, model: Any, call: EncodeCall) -> list[int]:
        """Tiles of each image, the base tile counted."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        pinpoints, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
        return [image_size_to_num_patches(size, pinpoints, side) for size in call.sizes]

    @abstractmethod
    def pack(self, model: Any, call: EncodeCall, rows: list[Tensor], newline: Tensor) -> list[Tensor]:
        """The model's own packing of `[tiles, P, C]` per image, `[N, C]`."""

    def shapes(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        (height, width), tiles = self.tile(model, call), self.tiles(model, call)
        numbers = torch.arange(sum(tiles) * height * width, dtype=torch.float64)
        index = torch.stack([numbers, numbers**2], -1).view(-1, height * width, 2)
        packed = self.pack(model, call, list(torch.split(index, tiles)), torch.tensor([-1.0, 1.0], dtype=torch.float64))
        return [self._shape((height, width), count - 1, rows) for count, rows in zip(tiles, packed, strict=True)]

    def _shape(self, base: tuple[int, int], tiles: int, rows: Tensor) -> TokenLayout:
        """The shape of an image whose packed index is ``rows`` `[N, 2]`: number and square of each unit, -1 newline."""
        structure, first = rows[:, 0] < 0, base[0] * base[1]
        line, views = structure.long().cumsum(0) - structure.long(), [base]
        if tiles:
            line[first:] += 1
            newlines = int(structure.sum())
            views.append((newlines, (len(rows) - first) // newlines - 1))
        places = (~structure).nonzero().squeeze(-1)
        units = rows[places]
        mapped = bool((units[:, 0] ** 2 == units[:, 1]).all())  # a mean's square is not the mean of the squares
        if not mapped:
            return TokenLayout(len(rows), tuple(views), None, line, places, mapped=False)
        number = units[:, 0].long()
        tile = number // first - number[0] // first if tiles else None
        return TokenLayout(len(rows), tuple(views), number, line, places, tile, tiles)
