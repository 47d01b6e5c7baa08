"""TokenPacker: coarse queries attend to the patches of their own cell, in several layers of the vision encoder."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tokensieve.errors import Refusal
from tokensieve.methods import ModelShape, Needs, TrainedMethod, heads_of, register
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


class Packer(nn.Module):
    """Make one row of each cell of patches. By default attention has a head per 128 columns."""

    def __init__(self, shape: ModelShape, levels: int, heads: int | None = None) -> None:
        super().__init__()
        width = shape.tower_width
        self.q_proj_1 = nn.Linear(shape.patch_width, width, bias=False)
        self.k_proj_1, self.v_proj_1 = _mlp(levels * width, width), _mlp(levels * width, width)
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(width, heads or heads_of(width, 128))
        self.mlp = _mlp(width, shape.width)

    def forward(self, coarse: Tensor, states: Tensor, cells: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows `[B, K, D]` and the share of each patch of a cell in its row, `[B, K, s²]`.

        Args:
            coarse: `[B, K, C]`, the image in K patches.
            states: `[B, N, levels · width]`.
            cells, filled: `[K, s²]`, the patches of each cell, and False on padding.
        """
        batch, count = coarse.shape[:2]
        query = self.ln_q_1(self.q_proj_1(coarse)).flatten(0, 1)[None]
        rows = self.ln_k_1(self.k_proj_1(states)), self.ln_v_1(self.v_proj_1(states))
        # [s², B · K, width]: each cell is a sequence of its own
        keys, values = (of_all[:, cells].flatten(0, 1).transpose(0, 1) for of_all in rows)
        out, shares = self.clip_attn(query, keys, values, key_padding_mask=~filled.repeat(batch, 1))
        return self.mlp(out[0]).unflatten(0, (batch, count)), shares.view(batch, count, -1)


@register("tokenpacker", paper="arXiv:2407.02392", needs=Needs(patches=True, grid=True), trained=True)
@dataclass(frozen=True)
class TokenPacker(TrainedMethod):
    """Make one token of each square of ``scale`` × ``scale`` patches, from several layers of the vision encoder.

    A query is the patch of a bilinearly smaller image. It attends to the patches of its own square: keys and values are
    made of the outputs of the layers ``levels``, side by side. The slot stands at the middle of its square. Squares at
    the border hold fewer patches where ``scale`` does not divide the grid.

    Args:
        weights: "random", a folder of ``tokensieve train tokenpacker``, or the authors' checkpoint.
        scale: side of a square in patches, so that an image keeps one token in scale².
        levels: layers of the vision encoder; a float is a share of the depth. These are 11, 15, 21 and 22 of 24.

    Cost: O(N·C²) time for keys and values, O(N·C) extra memory.
    Paper: "TokenPacker: Efficient Visual Projector for Multimodal LLM", 2024.
    Official code: counts the image's embedding as state 0, so that these layers are its 12, 16, 22 and 23; takes square
    grids that ``scale`` divides.
    """

    scale: int = 2
    levels: tuple[int | float, ...] = (0.45, 0.625, 0.875, 0.92)
    makes_rows: ClassVar = True
    least: ClassVar = {"scale": 1}

    Net = Packer
    published = "mm_projector."

    @property
    def needs(self) -> Needs:
        assert isinstance(self.info.needs, Needs)
        return replace(self.info.needs, encoder_states=self.levels)

    def make_net(self, shape: ModelShape, **sizes: Any) -> nn.Module:
        return Packer(shape, len(self.levels), **sizes)

    def reduce(self, image: ConnectorTokens) -> Reduction:
        net, patches = image.net, given(image.patches).float()
        assert isinstance(net, Packer)
        if image.grid is None:
            raise Refusal(f"tokenpacker needs tokens on a grid; these {image.total} tokens have none")
        cells, filled, middle = (part.to(patches.device) for part in _squares(image.grid, self.scale))
        planes = patches.transpose(1, 2).reshape(len(patches), -1, *image.grid)
        size = [-(-n // self.scale) for n in image.grid]
        coarse = interpolate(planes, size=size, mode="bilinear").flatten(2).transpose(1, 2)
        states = image.encoder_states.stack(self.levels).movedim(0, 2).flatten(2)  # [B, N, levels · C]
        rows, shares = net(coarse, states, cells, filled)
        parts = shares.new_zeros(*shares.shape[:2], image.total).scatter_add(-1, cells.expand_as(shares), shares)
        return image.made(rows, middle.expand(len(rows), -1), parts=parts)


def _mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


def _squares(grid: tuple[int, int], side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the patches of each square `[K, side²]`, which of them are on the grid, and the middle patches `[K]`."""
    top, left = (torch.arange(0, n, side) for n in grid)
    step = torch.arange(side)
    # [squares down, squares across, side, side]
    row, column = (top[:, None, None, None] + step[:, None]), (left[:, None, None] + step)
    filled = (row < grid[0]) & (column < grid[1])
    index = row.clamp(max=grid[0] - 1) * grid[1] + column.clamp(max=grid[1] - 1)
    members, on_grid = (part.flatten(2).flatten(0, 1) for part in (index, filled))
    return members, on_grid, index[:, :, side // 2, side // 2].flatten()
