"""Attention rows without eager attention: one module at a time is asked for what a method reads.

The probed module gets a copy of its config that names our attention function; that function computes the wanted rows
from the module's own queries and keys and then calls the kernel the model is configured with. Masks, weights, the
model's config and every other layer are untouched.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Read: TypeAlias = Callable[[Tensor, Tensor, float, Tensor | None], Any]
NAME = "tokensieve_probe"
CHUNK = 1024  # queries at once where all of them are read: never an [N, N] matrix


class Probe:
    """Reads one attention module, while armed in this thread.

    Args:
        attention: the module; must go through transformers' attention interface.
        read: what to read, from queries and keys `[b, H, n, d]`, their scaling, and the mask `[b or 1, 1, n, n]` (bool,
            or to be added) if there is one; e.g. :func:`attention_from_cls`.
    """

    def __init__(self, attention: Any, read: Read) -> None:
        self.attention, self.read = attention, read
        self._config = attention.config
        self._eager = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
        self._local = threading.local()
        config = copy.copy(attention.config)
        config._attn_implementation_internal = NAME  # the public setter would reach into sub-configs
        attention.config, attention._tokensieve_probe = config, self

    def arm(self) -> None:
        """Record from now on, until :meth:`take`."""
        self._local.rows = []

    def take(self) -> list[Any]:
        """What was read since :meth:`arm`, call by call. Disarms."""
        rows: list[Any] = getattr(self._local, "rows", None) or []
        self._local.rows = None
        return rows

    @contextmanager
    def only(self) -> Iterator[None]:
        """Read, and stop the forward that runs inside there: nothing after queries and keys is computed."""
        self.arm()
        self._local.stop = True
        try:
            yield
        except _Read:
            pass
        finally:
            self._local.stop = False

    def remove(self) -> None:
        self.attention.config = self._config
        del self.attention._tokensieve_probe

    def forward(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        """The attention function itself: read if armed, then the model's own kernel."""
        self.see(query, key, kwargs.get("scaling"), mask)
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(self._config._attn_implementation, self._eager)
        return kernel(module, query, key, value, mask, **kwargs)

    @property
    def armed(self) -> bool:
        return getattr(self._local, "rows", None) is not None

    def see(self, query: Tensor, key: Tensor, scaling: float | None, mask: Tensor | None) -> None:
        """Read if armed."""
        if self.armed:
            self._local.rows.append(self.read(query.detach(), key.detach(), scaling or query.shape[-1] ** -0.5, mask))
            if getattr(self._local, "stop", False):
                raise _Read


class _Read(Exception):
    """The row was read; the rest of the forward is not wanted."""


def attention_from_cls(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Post-softmax attention of token 0, mean over heads: `[b, H, n, d]` twice to `[b, n]` float32."""
    return _attention(query[:, :, :1], key, scaling, _rows(mask, slice(0, 1))).squeeze(-2)


def attention_received(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Post-softmax attention each token receives, mean over heads and the queries that see it: `[b, n]` float32.

    Keys that nobody sees are padding, and ask nothing either.
    """
    total = query.new_zeros((query.shape[0], key.shape[-2]), dtype=torch.float32)
    seen = total.clone()
    for start in range(0, query.shape[-2], CHUNK):
        part = slice(start, start + CHUNK)
        rows, own = query[:, :, part], _rows(mask, part)
        given = _attention(rows, key, scaling, own)
        if own is not None:
            visible = (own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2)[:, 0]
            if visible.shape[-2] == 1:
                visible = visible & visible[:, 0, part, None]
                given = given * visible.any(-1, keepdim=True)
            seen += visible.expand(-1, rows.shape[-2], -1).sum(-2)
        total += given.sum(-2)
    return total / (query.shape[-2] if mask is None else seen.clamp(min=1))


def attention_from_cls_wide(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """:func:`attention_from_cls` with the heads side by side as a single one, scaled by its width."""
    query, key = _one_head(query), _one_head(key)
    return attention_from_cls(query, key, query.shape[-1] ** -0.5, mask)


def attention_received_wide(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """:func:`attention_received` with the heads side by side as a single one, scaled by its width."""
    query, key = _one_head(query), _one_head(key)
    return attention_received(query, key, query.shape[-1] ** -0.5, mask)


def keys(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """The keys, `[b, n, H, d]`."""
    return key.transpose(1, 2)


def attention_of_queries(
    query: Tensor, key: Tensor, scaling: float, columns: Tensor, mask: Tensor | None, softcap: float | None = None
) -> Tensor:
    """Post-softmax attention of chosen queries, `[B, H, Q, n]` float32, in O(Q·n).

    Args:
        query: `[B, H, n, d]`.
        key: `[B, H/g, n, d]`: groups of g heads share their keys.
        columns: `[B, Q]`, the queries.
        mask: the block's own, `[B or 1, 1, n, n]` (bool, or to be added); else attention is causal, and this is
            `[B, n]`, 0 on padding, or ``None``.
        softcap: what the LLM keeps scores below, in size; ``None``: nothing.
    """
    chosen = query.take_along_dim(columns[:, None, :, None], -2)
    grouped = torch.unflatten(chosen, 1, (key.shape[1], -1))
    scores = (grouped @ key[:, :, None].transpose(-1, -2)).flatten(1, 2).float() * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None and mask.ndim == 4:
        rows = mask[:, 0].expand(len(columns), -1, -1)
        mask = rows.take_along_dim(columns[..., None], 1)
    else:
        seen = torch.arange(key.shape[-2], device=key.device) <= columns[..., None]
        mask = seen if mask is None else seen & mask[:, None].bool()
    return _masked(scores, mask[:, None]).softmax(-1)


def _attention(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Post-softmax attention, mean over heads, `[b, q, n]` float32."""
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    return (scores if mask is None else _masked(scores, mask)).softmax(-1).mean(1)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores in float32 where the mask lets them pass."""
    unseen = torch.finfo(torch.float32).min
    return scores.masked_fill(~mask, unseen) if mask.dtype == torch.bool else scores + mask.float()


def _rows(mask: Tensor | None, queries: slice) -> Tensor | None:
    """The mask of some queries, `[b or 1, 1, q, n]`; a 2-D mask of flash kernels says which keys there are."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[:, None, None].bool()
    return mask[:, :1] if mask.shape[-2] == 1 else mask[:, :1, queries]


def _one_head(heads: Tensor) -> Tensor:
    """`[b, H, n, d]` to `[b, 1, n, H·d]`."""
    return heads.transpose(1, 2).flatten(2)[:, None]


def _probe_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    probe: Probe = module._tokensieve_probe
    return probe.forward(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, _probe_attention)
