"""Rows that tell an encoder the place of each patch, added to its position embeddings before training.

Initialised as usual, position embeddings are a thirtieth of the patch embeddings, and a tower trained for minutes never
finds out what is beside what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokensieve.reference.vocabulary import GRID

if TYPE_CHECKING:
    from torch import Tensor


def place_marks(width: int, size: float, waves: int = 4, seed: int = 0) -> Tensor:
    """Return slow cosines of row and column along random directions, `[145, width]`; the row of [CLS] is zero.

    `size` is the root mean square of the other rows.
    """
    import torch

    angles = (torch.arange(GRID) + 0.5) * torch.pi / GRID
    cosines = torch.stack([(wave * angles).cos() / wave for wave in range(1, waves + 1)], 1)
    rows, columns = cosines.repeat_interleave(GRID, 0), cosines.repeat(GRID, 1)
    generator = torch.Generator().manual_seed(seed)
    places = torch.cat([rows, columns], 1) @ torch.randn(2 * waves, width, generator=generator)
    return torch.cat([places.new_zeros(1, width), places * size / places.square().mean().sqrt()])
