"""Attention rows of one module, computed from its queries and keys. No `[N, N]` matrix is made."""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES_AT_ONCE = 1024


def attention_from_cls(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Return the post-softmax attention of token 0, mean over heads, `[B, N]` float32.

    Args:
        query, key: `[B, H, N, d]`.
        mask: `[B or 1, 1, N, N]`, bool or additive; `[B, N]` from flash kernels.
    """
    return _mean_attention(query[:, :, :1], key, scaling, _mask_rows(mask, slice(0, 1))).squeeze(-2)


def attention_received(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Return the post-softmax attention that each token receives, `[B, N]` float32.

    The mean is over the heads and over the queries that see the token. Arguments as in :func:`attention_from_cls`.
    """
    total = query.new_zeros((query.shape[0], key.shape[-2]), dtype=torch.float32)
    seen_by = total.clone()
    for start in range(0, query.shape[-2], QUERIES_AT_ONCE):
        chunk = slice(start, start + QUERIES_AT_ONCE)
        chunk_query, chunk_mask = query[:, :, chunk], _mask_rows(mask, chunk)
        attention = _mean_attention(chunk_query, key, scaling, chunk_mask)
        if chunk_mask is not None:
            visible = _visible(chunk_mask)[:, 0]
            # a token that does not see itself is padding: the attention of its query counts for nothing
            is_token = (
                visible[:, 0, chunk] if visible.shape[-2] == 1 else visible[..., chunk].diagonal(dim1=-2, dim2=-1)
            )
            visible = visible & is_token[..., None]
            attention = attention * is_token[..., None]
            seen_by += visible.expand(-1, chunk_query.shape[-2], -1).sum(-2)
        total += attention.sum(-2)
    return total / (query.shape[-2] if mask is None else seen_by.clamp(min=1))


def attention_from_cls_single_head(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Return :func:`attention_from_cls` with all heads joined into one, scaled by its width."""
    query, key = _join_heads(query), _join_heads(key)
    return attention_from_cls(query, key, query.shape[-1] ** -0.5, mask)


def attention_received_single_head(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Return :func:`attention_received` with all heads joined into one, scaled by its width."""
    query, key = _join_heads(query), _join_heads(key)
    return attention_received(query, key, query.shape[-1] ** -0.5, mask)


def keys_by_head(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Return the keys, `[B, N, H, d]`."""
    return key.transpose(1, 2)


def keys_joined(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Return the keys with the heads side by side, `[B, N, H·d]`."""
    return key.transpose(1, 2).flatten(2)


def attention_of_queries(
    query: Tensor,
    key: Tensor,
    scaling: float,
    columns: Tensor,
    mask: Tensor | None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the post-softmax attention of chosen queries, `[B, H, Q, N]` float32, in O(Q·N).

    Args:
        query: `[B, H, N, d]`.
        key: `[B, H/g, N, d]`: groups of g heads share their keys.
        columns: `[B, Q]`, the chosen queries.
        mask: the layer's own, `[B or 1, 1, N, N]` (bool or additive); else attention is causal, and this is `[B, N]`, 0
            on padding, or ``None``.
        softcap: the bound that the LLM keeps scores below; ``None``: no bound.
        bias: `[B, N]`, added to the scores of each key.
    """
    chosen = query.take_along_dim(columns[:, None, :, None], -2)
    # [B, H/g, g, Q, d] against [B, H/g, 1, N, d]: shared keys are broadcast over their group, never repeated in memory
    grouped = torch.unflatten(chosen, 1, (key.shape[1], -1))
    scores = (grouped @ key[:, :, None].transpose(-1, -2)).flatten(1, 2).float() * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias[:, None, None]
    if mask is not None and mask.ndim == 4:
        mask_of_query = mask[:, 0].expand(len(columns), -1, -1)
        mask = mask_of_query.take_along_dim(columns[..., None], 1)
    else:
        causal = torch.arange(key.shape[-2], device=key.device) <= columns[..., None]
        mask = causal if mask is None else causal & mask[:, None].bool()
    return _masked(scores, mask[:, None]).softmax(-1)


def rope_gain(cos: Tensor, sin: Tensor) -> Tensor:
    """Return a vector of ones, rotated by the rotary embedding of each position: `[B, N, d]` float32."""
    half = cos.shape[-1] // 2
    return torch.cat([cos[..., :half] - sin[..., :half], cos[..., half:] + sin[..., half:]], -1).float()


def _mean_attention(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Post-softmax attention, mean over heads, `[B, Q, N]` float32."""
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    return (scores if mask is None else _masked(scores, mask)).softmax(-1).mean(1)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores in float32, at the lowest number where a bool mask is False; an additive mask is added."""
    lowest = torch.finfo(torch.float32).min
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask.float()


def _visible(mask: Tensor) -> Tensor:
    """True where a mask lets a query see a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _mask_rows(mask: Tensor | None, queries: slice) -> Tensor | None:
    """The mask of some queries, `[B or 1, 1, Q or 1, N]`."""
    if mask is None:
        return None
    if mask.ndim == 2:  # flash kernels get `[B, N]`, which keys exist, for all queries alike
        return mask[:, None, None].bool()
    return mask[:, :1] if mask.shape[-2] == 1 else mask[:, :1, queries]


def _join_heads(heads: Tensor) -> Tensor:
    """`[B, H, N, d]` to `[B, 1, N, H·d]`."""
    return heads.transpose(1, 2).flatten(2)[:, None]
