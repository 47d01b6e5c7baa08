"""Projectors that receive patches and join each unit of them into one row by pixel shuffle."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokensieve.models.family import EncodeCall, Family


class PixelShuffle(Family):
    """Run the projector on any units. Each unit is passed as a tile, because the projector shuffles tiles."""

    def patches(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        return self.in_units(model, call, rows).flatten(1)

    def project(self, model: Any, rows: Tensor) -> Tensor:
        tiles = rows.view(len(rows), self.merge(model) ** 2, -1)  # [n, patches of a unit, C]
        projected: Tensor = self.projector(model)(tiles)
        return projected.view(len(rows), -1)
