"""What later steps must know, kept on the KV cache: it dies with the sequence and follows it everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from tokensieve.errors import Refusal

STATE = "_tokensieve_state"


@dataclass(frozen=True)
class PrefixInfo:
    """A reduced prefix, up to and with its last image token; every later column stands for itself.

    Attributes:
        mask: `[B, P]` long, 0 where a row of the reduced prefix is padding.
        padded: whether any row is; known without a look at the device.
        length: columns of the prefix as the caller sees it.
        shift: `[B, 1]` (or `[axes, B, 1]` for M-RoPE), what contiguous positions are behind the caller's; else None.
        renumbered: in the state of a block, `[B, 1]` bool: rows that contiguous positions apply to; ``None``: all.
        columns: in the state of a block of an LLM with windows, `[B, P]`: where each column stood as it entered, as
            the caller counts.
    """

    mask: Tensor
    padded: bool
    length: int
    shift: Tensor | None = None
    renumbered: Tensor | None = None
    columns: Tensor | None = None

    @property
    def dropped(self) -> int:
        """Columns by which the cache is shorter than the caller believes."""
        return self.length - self.mask.shape[1]

    def after(self, earlier: PrefixInfo) -> PrefixInfo:
        """The state of a sequence that ``earlier`` covers so far and whose next columns are this one's."""
        shift = earlier.shift if self.shift is None else self.shift
        if earlier.shift is not None and self.shift is not None:
            shift = earlier.shift + self.shift
        mask = torch.cat([earlier.mask, self.mask], 1)
        return PrefixInfo(mask, earlier.padded or self.padded, earlier.length + self.length, shift)

    @property
    def matters(self) -> bool:
        """Whether a later step must know: a batch may keep its width, and still have got padding or other positions."""
        return self.dropped > 0 or self.padded or self.shift is not None


class _Reduced:
    """A cache layer that holds ``dropped`` columns fewer than it reports, so that callers keep counting as before.

    The contract is that of transformers' sliding-window layers: masks are sized by ``get_mask_sizes``.
    """

    dropped: int

    @classmethod
    def adopt(cls, layer: Any, dropped: int) -> Any:
        """The same layer, with all it holds, as one of this kind."""
        reduced = cls.__new__(cls)
        reduced.__dict__.update(layer.__dict__)
        reduced.dropped = dropped
        return reduced

    def held(self) -> int:
        """Columns that went through the layer."""
        return int(super().get_seq_length())  # type: ignore[misc]

    def get_seq_length(self) -> int:
        held = self.held()
        return held + self.dropped if held else 0

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.dropped = 0


class ReducedLayer(_Reduced, DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """One with full attention."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.held()
        return held + query_length, self.dropped if held else 0


class ReducedSlidingLayer(_Reduced, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """One whose attention has a window, which slides over the columns that are held."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length)
        return length, offset + self.dropped if self.held() else 0


REDUCED: dict[type, Any] = {
    DynamicLayer: ReducedLayer,
    ReducedLayer: ReducedLayer,
    DynamicSlidingWindowLayer: ReducedSlidingLayer,
    ReducedSlidingLayer: ReducedSlidingLayer,
}
ALLOWED = (*REDUCED, LinearAttentionLayer)


@dataclass(frozen=True)
class CacheInfo:
    """The states of a cache: of the LLM's entry, and of the blocks that saw fewer tokens than it."""

    entry: PrefixInfo
    blocks: dict[int, PrefixInfo]


def states_of(cache: Cache | None) -> CacheInfo | None:
    """What a reduced prefill left on the cache, if any; one that was emptied since has nothing."""
    if cache is not None and cache.get_seq_length() == 0:
        vars(cache).pop(STATE, None)
    return getattr(cache, STATE, None)


def remember(cache: Cache, states: CacheInfo) -> None:
    """Put the states on a cache that was just filled, and let its layers report the caller's lengths."""
    for i, layer in enumerate(cache.layers):
        reduced = REDUCED.get(type(layer))
        if reduced is not None:  # else it holds no columns
            cache.layers[i] = reduced.adopt(layer, states.blocks.get(i, states.entry).dropped)
    setattr(cache, STATE, states)


def all_of(cache: Cache, states: CacheInfo | None, mask: Tensor | None, rows: int, device: torch.device) -> PrefixInfo:
    """The state of everything that a filled cache holds; ``mask`` is the caller's, over all its columns."""
    length = cache.get_seq_length()
    known = (
        PrefixInfo(torch.ones(rows, 0, dtype=torch.long, device=device), False, 0) if states is None else states.entry
    )
    tail = known.mask.new_ones(rows, length - known.length) if mask is None else mask[:, known.length : length]
    return PrefixInfo(tail.to(known.mask.dtype), mask is not None, tail.shape[1]).after(known)


def translate_decode_inputs(
    kwargs: dict[str, Any], state: PrefixInfo, cache: Cache, first_position: int = 0
) -> dict[str, Any]:
    """Arguments of a forward that continues a reduced sequence: mask columns and positions translated.

    Args:
        first_position: the position id of a prompt's first token.
    """
    kwargs, mask, positions = dict(kwargs), kwargs.get("attention_mask"), kwargs.get("position_ids")
    new = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    queries = new.shape[1]
    kwargs["attention_mask"] = step_mask(state, mask, cache.get_seq_length() + queries)
    if state.shift is not None:
        if positions is None:
            if state.shift.ndim == 3:
                raise Refusal("contiguous positions with M-RoPE: pass position_ids when decoding by hand")
            positions = torch.arange(queries, device=new.device) + cache.get_seq_length() + first_position
        kwargs["position_ids"] = positions - state.shift
    return kwargs


def step_mask(state: PrefixInfo, mask: Tensor | None, width: int) -> Tensor | None:
    """2-D mask of a later step, `[B, width]`, in the columns that a reduced layer reports; ``None``: no padding.

    Args:
        mask: the caller's, over all its columns.
        width: columns of the sequence after this step, as the caller counts.
    """
    if mask is None and not state.padded:
        return None
    rows = len(state.mask)
    tail = state.mask.new_ones(rows, width - state.length) if mask is None else mask[:, state.length :]
    absent = state.mask.new_zeros(rows, state.dropped)
    return torch.cat([absent, state.mask, tail.to(state.mask.dtype)], 1)


def check_cache(cache: Cache | None) -> None:
    """Refuse caches that a reduced prompt cannot live in, before anything runs."""
    if cache is None:
        return
    if cache.is_compileable:
        raise Refusal("a static cache cannot hold a reduced prompt; use the default dynamic cache")
    for layer in cache.layers:
        if type(layer) not in ALLOWED:
            raise Refusal(f"a cache with {type(layer).__name__} is not supported; use plain DynamicCache layers")
