"""What later steps must know, kept on the KV cache: it dies with the sequence and follows it everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

STATE = "_tokensieve_state"


@dataclass(frozen=True)
class State:
    """A reduced prefix, up to and with its last image token; every later column stands for itself.

    Attributes:
        mask: `[B, P]` long, 0 where a row of the reduced prefix is padding.
        padded: whether any row is; known without a look at the device.
        length: columns of the prefix as the caller sees it.
        shift: `[B, 1]` (or `[axes, B, 1]` for M-RoPE), what contiguous positions are behind the caller's; else None.
    """

    mask: Tensor
    padded: bool
    length: int
    shift: Tensor | None

    @property
    def dropped(self) -> int:
        """Columns by which the cache is shorter than the caller believes."""
        return self.length - self.mask.shape[1]


class ReducedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A cache layer that holds ``dropped`` columns fewer than it reports, so that callers keep counting as before.

    The contract is that of transformers' sliding-window layers: masks are sized by :meth:`get_mask_sizes`.
    """

    dropped: int

    @classmethod
    def adopt(cls, layer: DynamicLayer, dropped: int) -> ReducedLayer:
        reduced = cls.__new__(cls)
        reduced.__dict__.update(layer.__dict__)
        reduced.dropped = dropped
        return reduced

    def get_seq_length(self) -> int:
        held = int(super().get_seq_length())
        return held + self.dropped if held else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = int(super().get_seq_length())
        return held + query_length, self.dropped if held else 0

    def reset(self) -> None:
        super().reset()
        self.dropped = 0


def state_of(cache: Cache | None) -> State | None:
    """The state that a reduced prefill left on the cache, if any; one that was emptied since has none."""
    if cache is not None and cache.get_seq_length() == 0:
        vars(cache).pop(STATE, None)
    return getattr(cache, STATE, None)


def remember(cache: Cache, state: State) -> None:
    """Put the state on a cache that was just filled, and let its layers report the caller's lengths."""
    for i, layer in enumerate(cache.layers):
        cache.layers[i] = ReducedLayer.adopt(layer, state.dropped)
    setattr(cache, STATE, state)


def later_step(kwargs: dict[str, Any], state: State, cache: Cache) -> dict[str, Any]:
    """Arguments of a forward that continues a reduced sequence: mask columns and positions translated."""
    kwargs, mask, positions = dict(kwargs), kwargs.get("attention_mask"), kwargs.get("position_ids")
    new = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    queries, rows = new.shape[1], len(new)
    if mask is not None or state.padded:
        if mask is None:
            tail = state.mask.new_ones(rows, cache.get_seq_length() + queries - state.length)
        else:
            tail = mask[:, state.length :].to(state.mask.dtype)
        absent = state.mask.new_zeros(rows, state.dropped)
        kwargs["attention_mask"] = torch.cat([absent, state.mask.expand(rows, -1), tail], 1)
    if state.shift is not None:
        if positions is None:
            if state.shift.ndim == 3:
                raise ValueError("contiguous positions with M-RoPE: pass position_ids when decoding by hand")
            positions = torch.arange(queries, device=new.device) + cache.get_seq_length()
        kwargs["position_ids"] = positions - state.shift
    return kwargs


def check_cache(cache: Cache | None) -> None:
    """Refuse caches that a reduced prompt cannot live in, before anything runs."""
    if cache is None:
        return
    if cache.is_compileable:
        raise ValueError("a static cache cannot hold a reduced prompt; use the default dynamic cache")
    if cache.get_seq_length():
        raise ValueError("new images on a filled cache are not supported; start a new sequence with all its images")
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, ReducedLayer):
            raise ValueError(f"a cache with {type(layer).__name__} is not supported; use plain DynamicCache layers")
