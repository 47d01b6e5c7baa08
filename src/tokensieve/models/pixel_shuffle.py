"""Projectors that take patches and shuffle each unit of them into one row themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokensieve.models.family import EncodeCall, Family


class PixelShuffle(Family):
    """A unit alone is a tile of one unit: so the projector can be asked about any unit."""

    def patches(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        return self.in_units(model, call, rows).flatten(1)

    def project(self, model: Any, rows: Tensor) -> Tensor:
        alone = rows.view(len(rows), self.merge(model) ** 2, -1)
        projected: Tensor = self.projector(model)(alone)
        return projected.view(len(rows), -1)
