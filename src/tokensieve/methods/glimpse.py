"""The net of GlimpsePrune: a learned query, and the predictor that its attention and the vision encoder inform."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from tokensieve.methods.trained import ModelShape


class Block(nn.Module):
    """Attention whose queries and keys see the vision encoder's states beside the rows, and a gated MLP.

    Args:
        width: F, of the rows.
        beside: C, of the states.
        heads: number of heads.
    """

    def __init__(self, width: int, beside: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        joined, wide = width + beside, 2 * width
        sizes = {"q_proj": joined, "k_proj": joined, "v_proj": width, "o_proj": width}
        self.attn = nn.ModuleDict({name: nn.Linear(size, size, bias=False) for name, size in sizes.items()})
        shapes = {"gate_proj": (width, wide), "up_proj": (width, wide), "down_proj": (wide, width)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*widths) for name, widths in shapes.items()})

    def forward(self, rows: Tensor, states: Tensor, angles: Tensor) -> Tensor:
        """Return new rows `[B, N, F]`; ``states`` `[B, N, C]`, ``angles`` `[B, N, d / 2]` for heads of d columns."""
        normed = self.norm1(rows)
        joined = torch.cat([normed, states], -1)
        inputs = {"q_proj": joined, "k_proj": joined, "v_proj": normed}
        query, key, value = (
            self.attn[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name, x in inputs.items()
        )
        attended = scaled_dot_product_attention(rotated(query, angles), rotated(key, angles), value)
        rows = rows + self.attn["o_proj"](attended.transpose(1, 2).flatten(2))
        normed = self.norm2(rows)
        out: Tensor = rows + self.mlp["down_proj"](silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed))
        return out


class Predictor(nn.Module):
    """Map the query's attention to each token to the logit of keeping it, with one block for each encoder layer read.

    Args:
        entering: H, heads of the LLM.
        encoder: width of the vision encoder.
        levels: encoder layers read.
        width, beside: F and C.
        heads: heads of the blocks.
    """

    def __init__(self, entering: int, encoder: int, levels: int, width: int, beside: int, heads: int) -> None:
        super().__init__()
        if (width + beside) % (4 * heads):
            raise ValueError(f"heads have a multiple of four columns; got {width} + {beside} for {heads} heads")
        self.attn_in_proj = nn.Linear(entering, width)
        self.cond_in_projs = nn.ModuleList(nn.Linear(encoder, beside) for _ in range(levels))
        self.layers = nn.ModuleList(Block(width, beside, heads) for _ in range(levels))
        none = [nn.Identity() for _ in range(levels - 1)]  # the authors' names count from the last block
        self.attn_out_projs = nn.ModuleList([*none, nn.Linear(width, 1)])
        self.quarter = (width + beside) // (4 * heads)

    def forward(self, attention: Tensor, states: Tensor, places: Tensor) -> Tensor:
        """Return `[B, N]` from ``attention`` `[B, N, H]`, ``states`` `[levels, B, N, E]` and ``places`` `[B, N, 2]`."""
        rates = 10000.0 ** (-torch.arange(self.quarter, device=places.device) / self.quarter)
        angles = (places[..., None] * rates).flatten(2)  # of the row, then of the column
        rows = self.attn_in_proj(attention)
        for block, project, level in zip(self.layers, self.cond_in_projs, states, strict=True):
            rows = block(rows, project(level), angles)
        logits: Tensor = self.attn_out_projs[-1](rows)[..., 0]
        return logits


class Glimpse(nn.Module):
    """The query's learned rows, one for each layer of the LLM, and the predictor.

    Args:
        levels: layers of the vision encoder that the predictor reads.
        width, beside, heads: sizes of its blocks; by default 256 and 512, or fewer columns in a narrow model.
    """

    def __init__(
        self, shape: ModelShape, levels: int, width: int | None = None, beside: int | None = None, heads: int = 4
    ) -> None:
        super().__init__()
        width = width or min(256, max(1, shape.width // 64) * 16)
        self.learnable_embeddings = nn.Parameter(torch.randn(shape.layers, 1, shape.width) * 0.02)
        self.le_proj, self.le_norm = nn.Linear(shape.width, shape.width), nn.RMSNorm(shape.width)
        self.attn_fuser = Predictor(shape.heads, shape.tower_width, levels, width, beside or 2 * width, heads)

    def added(self, layer: int, eps: float) -> Tensor:
        """Return the row `[1, D]` that is added to the query before a layer; ``eps`` is that of the LLM's norms."""
        row, scale = self.le_proj(self.learnable_embeddings[layer]), self.le_norm.weight
        return rms_norm(row, scale.shape, scale, eps)


def rotated(rows: Tensor, angles: Tensor) -> Tensor:
    """Rotate the two halves of `[B, heads, N, d]` against each other by `[B, N, d / 2]`."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = rows.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
