"""The net of LLaVA-Mini: a compressor of patches, and blocks that run beside the LLM."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tokensieve.methods.mqt import place_code
from tokensieve.methods.side import SideBlocks
from tokensieve.methods.trained import ModelShape, heads_of


class Compressor(nn.Module):
    """Mix patches into a square number of rows. By default attention has a head per 128 columns."""

    pos_embed: Tensor

    def __init__(self, width: int, queries: int, heads: int | None = None) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.register_buffer("pos_embed", place_code(isqrt(queries), width))  # of the queries, on a grid of their own
        self.attn = nn.MultiheadAttention(width, heads or heads_of(width, 128), batch_first=True)
        self.ln_q, self.ln_kv = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the rows `[B, K, C]` and the attention `[B, K, N]`, mean over heads, of patches `[B, N, C]`."""
        side = isqrt(len(self.query))
        planes = self.pos_embed.T.reshape(1, -1, side, side)
        places = interpolate(planes, size=grid, mode="bicubic")[0].flatten(1).T  # [N, C]
        query, values = self.ln_q(self.query) + self.pos_embed, self.ln_kv(patches)
        mixed: tuple[Tensor, Tensor] = self.attn(query.expand(len(patches), -1, -1), values + places, values)
        return mixed


class MiniNet(nn.Module):
    """The compressor, and the blocks of the pre-fusion: at first copies of the LLM's first layers."""

    def __init__(self, shape: ModelShape, llm: Any, queries: int, blocks: int, heads: int | None = None) -> None:
        super().__init__()
        self.compressor = Compressor(shape.patch_width, queries, heads)
        self.prefusion_layers = SideBlocks(shape, llm, 0, blocks)
        self.sizes = {"queries": queries, "blocks": blocks, "heads": self.compressor.attn.num_heads}
