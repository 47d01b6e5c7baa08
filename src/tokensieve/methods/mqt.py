"""MQT: the first m of learned queries attend to the places of the patches."""

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import ModelShape, Needs, TrainedMethod, heads_of, register
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


class Resampler(nn.Module):
    """Mix patches into rows by a square number of queries. By default attention has a head per 64 columns."""

    pos_embed: Tensor

    def __init__(self, shape: ModelShape, queries: int = 256, heads: int | None = None) -> None:
        super().__init__()
        width = shape.patch_width
        self.query = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.register_buffer("pos_embed", place_code(isqrt(queries), width))  # of the queries, on a grid of their own
        self.attn = nn.MultiheadAttention(width, heads or heads_of(width, 64))
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.randn(width, shape.width) * shape.width**-0.5)
        self._kept: dict[object, Tensor] = {}
        self.register_load_state_dict_post_hook(lambda net, _: net._kept.clear())  # type: ignore[no-untyped-call]

    def forward(self, patches: Tensor, shares: Tensor) -> Tensor:
        """Return `[B, m, D]`: patches `[B, N, C]` mixed by the shares of the first m queries, `[heads, m, N]`."""
        *_, weight = self.attn.in_proj_weight.chunk(3)
        *_, bias = self.attn.in_proj_bias.chunk(3)
        value = (self.ln_v(patches) @ weight.T + bias).unflatten(-1, (self.attn.num_heads, -1))
        mixed: Tensor = self.attn.out_proj(torch.einsum("hmn,bnhd->bmhd", shares, value).flatten(-2)) @ self.proj
        return mixed

    def shares(self, grid: tuple[int, int]) -> Tensor:
        """Return the attention of the queries to the places of a grid, `[heads, Q, N]`; kept unless it is trained."""
        key = grid, self.query.device
        shares = self._kept.get(key)
        if shares is None or self.query.requires_grad:
            shares = torch.inference_mode(False)(self._shares)(grid)  # the kept ones may meet a later backward pass
            self._kept = {} if self.query.requires_grad else {key: shares}  # of the latest size alone
        return shares

    def _shares(self, grid: tuple[int, int]) -> Tensor:
        side = isqrt(len(self.query))
        planes = self.pos_embed.T.reshape(1, -1, side, side)
        places = interpolate(planes, size=grid, mode="bicubic")[0].flatten(1).T  # [N, C]
        weights, biases = self.attn.in_proj_weight.chunk(3)[:2], self.attn.in_proj_bias.chunk(3)[:2]
        maps = zip((self.ln_q(self.query + self.pos_embed), self.ln_k(places)), weights, biases, strict=True)
        queries, keys = ((rows @ w.T + b).unflatten(-1, (self.attn.num_heads, -1)) for rows, w, b in maps)
        return torch.einsum("qhd,nhd->hqn", queries / keys.shape[-1] ** 0.5, keys).softmax(-1)


@register("mqt", paper="arXiv:2405.19315", needs=Needs(patches=True, grid=True), trained=True)
@dataclass(frozen=True)
class Mqt(TrainedMethod):
    """Replace the tokens by the first ``keep`` of learned queries, which attend to the places of the patches.

    The queries are nested: one net serves each number of tokens up to theirs. Keys are places without content, so every
    row is a learned mean of the patches, the same for all images, with other weights in each head. The slots stand
    evenly spaced in the image, because a query has no place. Smaller images stay whole.

    Args:
        weights: "random", a folder of ``tokensieve train mqt``, or the authors' checkpoint.
        keep: tokens per image, or a share of them; at most the number of queries (published: 256).
        nested: train an even number of queries that is drawn anew in each step, up to ``keep``; False: all of ``keep``.

    Cost: O(K·N·C) time; the attention is computed once for images of one size.
    Paper: "Matryoshka Query Transformer for Large Vision-Language Models", NeurIPS 2024.
    Official code: numbers the positions of the rows from the image's first one on: ``positions="contiguous"``. Stores
    the code of places in half precision.
    """

    keep: Budget = 64
    nested: bool = True
    makes_rows: ClassVar = True

    Net = Resampler
    published = "query_abstractor."

    def reduce(self, image: ConnectorTokens) -> Reduction:
        net, count = image.net, image.budget
        assert isinstance(net, Resampler)
        if image.grid is None:
            raise Refusal(f"mqt needs tokens on a grid; these {image.total} tokens have none")
        if count > len(net.query):
            raise Refusal(f"this net has {len(net.query)} queries; keep asks for {count} tokens")
        if net.training and self.nested and count > 2:
            count = 2 * int(torch.randint(1, count // 2 + 1, ()))
        shares = net.shares(image.grid)[:, :count]
        rows = net(given(image.patches).float(), shares)
        anchors = torch.arange(count, device=rows.device) * image.total // count
        parts = shares.mean(0).expand(len(rows), -1, -1)
        return image.made(rows, anchors.expand(len(rows), -1), parts=parts)


def place_code(side: int, width: int) -> Tensor:
    """Return sines and cosines of column, then of row, of a square grid, `[side², width]`."""
    quarter = (width + 3) // 4
    rate = 10000 ** (-torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [coordinate.flatten()[:, None] * rate for coordinate in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], -1)[:, :width]
