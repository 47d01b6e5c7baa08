"""Bookkeeping for decode steps, stored on the KV cache object so that it is copied and freed together with it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from tokensieve.engine.sizes import joined_bias
from tokensieve.engine.turns import Conversation
from tokensieve.errors import Refusal

ATTRIBUTE = "_tokensieve_cache_info"


@dataclass(frozen=True)
class PrefixInfo:
    """A reduced prefix of the sequence, up to and including its last visual token; later columns are as they were.

    Attributes:
        mask: `[B, P]` long, 0 where a row of the reduced prefix is padding.
        padded: whether any row has padding; known without reading the device.
        length: columns of the prefix as the caller counts them.
        shift: `[B, 1]` (or `[axes, B, 1]` for M-RoPE), the caller's position ids minus the contiguous ones; ``None`` if
            positions were kept.
        renumbered_rows: in the prefix of one layer, `[B, 1]` bool, the rows with contiguous positions; ``None``: all.
        original_columns: in the prefix of one layer of an LLM with sliding windows, `[B, P]`: the place of each column
            when it entered the LLM, as the caller counts.
        bias: `[1, B, P]` float32, added to the attention scores of the columns where attention is repaired;
            `[2, B, P]`: the LLM's first layer has the first one. ``None``: nothing is added.
    """

    mask: Tensor
    padded: bool
    length: int
    shift: Tensor | None = None
    renumbered_rows: Tensor | None = None
    original_columns: Tensor | None = None
    bias: Tensor | None = None

    @property
    def dropped(self) -> int:
        """Columns that the cache lacks, compared with the caller's count; negative where registers were added."""
        return self.length - self.mask.shape[1]

    @property
    def matters(self) -> bool:
        """Whether decode steps need it: a batch may keep its width, and still have new padding or positions."""
        return self.dropped != 0 or self.padded or self.shift is not None or self.bias is not None

    def after(self, earlier: PrefixInfo) -> PrefixInfo:
        """Return the prefix that consists of ``earlier`` and then this one."""
        shift = earlier.shift if self.shift is None else self.shift
        if earlier.shift is not None and self.shift is not None:
            shift = earlier.shift + self.shift
        mask = torch.cat([earlier.mask, self.mask], 1)
        bias = joined_bias(earlier.bias, earlier.mask.shape[1], self.bias, self.mask.shape[1])
        return PrefixInfo(mask, earlier.padded or self.padded, earlier.length + self.length, shift, bias=bias)

    def rows(self, index: Tensor) -> PrefixInfo:
        """Return the prefix of other rows: ``index`` `[R]` names the row of each."""

        def take(part: Tensor | None, axis: int) -> Tensor | None:
            return None if part is None else part.index_select(axis, index)

        return replace(
            self,
            mask=self.mask[index],
            shift=take(self.shift, -2),
            renumbered_rows=take(self.renumbered_rows, 0),
            original_columns=take(self.original_columns, 0),
            bias=take(self.bias, 1),
        )


@dataclass(frozen=True)
class CacheInfo:
    """The bookkeeping of one cache.

    Attributes:
        entry: the prefix as it entered the LLM.
        layers: {layer: prefix} for each layer that received fewer tokens than the first.
        conversation: what a later turn needs to be decided anew; ``None`` without ``reselect``.
    """

    entry: PrefixInfo
    layers: dict[int, PrefixInfo]
    conversation: Conversation | None = None

    @property
    def repaired(self) -> bool:
        """Whether the attention to some layer's columns has a bias."""
        return any(prefix.bias is not None for prefix in (self.entry, *self.layers.values()))


class _Reduced:
    """A cache layer that holds ``dropped`` columns fewer than it reports, so that callers keep counting as before.

    The contract is that of transformers' sliding-window layers: masks are sized by ``get_mask_sizes``.

    Attributes:
        moved: whether rows of the batch were moved, repeated or selected since the prefill.
    """

    dropped: int
    moved = False

    @classmethod
    def adopt(cls, layer: Any, dropped: int) -> Any:
        """Return a cache layer with all the contents of ``layer``, as one of this class."""
        reduced: Any = cls.__new__(cls)
        reduced.__dict__.update(layer.__dict__)
        reduced.dropped = dropped
        reduced._layer_type = getattr(layer, "_layer_type", None)
        if getattr(layer, "prefill_length", None) is not None:  # generate() declares the prompt's length beforehand
            reduced.prefill_length = layer.prefill_cumulative_length
        return reduced

    def held(self) -> int:
        """Return the columns that went through the layer."""
        return int(super().get_seq_length())  # type: ignore[misc]

    def get_seq_length(self) -> int:
        held = self.held()
        return held + self.dropped if held else 0

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.dropped, self.moved = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.moved = True

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.moved = True

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.moved = True


class ReducedLayer(_Reduced, DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A reduced cache layer with full attention."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.held()
        return held + query_length, self.dropped if held else 0


class ReducedSlidingLayer(_Reduced, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A reduced cache layer whose attention has a window, which slides over the columns that are held."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length)
        return length, offset + self.dropped if self.held() else 0


SHORTENED = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",  # the indexer's keys are shorter, too
    "LinearAttentionAndFullAttentionLayer",  # its convolution runs over the tokens that entered the LLM
    "LinearAttentionAndSlidingWindowAttentionLayer",
)
"""Names of transformers' cache layers that can hold a reduced prompt; older releases have fewer of them."""
REFERENCE = "reference_sliding_attention"
"""Kind of cache layer that models define themselves: the whole prompt, and a window over the answer."""


@cache
def reduced_class(kind: Any) -> Any:
    """Return the class of the reduced cache layers of a kind; ``None`` if it cannot hold a reduced prompt."""
    if issubclass(kind, _Reduced):
        return kind
    is_listed = any(getattr(cache_utils, name, None) is kind for name in SHORTENED)
    if not is_listed and getattr(kind, "_layer_type", None) != REFERENCE:
        return None
    base = ReducedSlidingLayer if issubclass(kind, DynamicSlidingWindowLayer) else ReducedLayer
    # transformers makes new caches of the class that declared a layer type last: a reduced class declares none
    return base if kind in base.__bases__ else type(f"Reduced{kind.__name__}", (base, kind), {"_layer_type": None})


NO_COLUMNS = tuple(filter(None, (LinearAttentionLayer, getattr(cache_utils, "DummyLayer", None))))
"""Cache layers that hold no columns, so nothing is dropped from them."""


def info_of(cache: Cache | None) -> CacheInfo | None:
    """Return the bookkeeping that a reduced prefill left on the cache; ``None`` if there is none, or it was emptied."""
    if cache is not None and cache.get_seq_length() == 0:
        vars(cache).pop(ATTRIBUTE, None)
    return getattr(cache, ATTRIBUTE, None)


def remember(cache: Cache, info: CacheInfo) -> None:
    """Put the bookkeeping on a cache that was just filled, and make its layers report the caller's lengths."""
    for number, layer in enumerate(cache.layers):
        kind: Any = type(layer)
        reduced = reduced_class(kind)
        if reduced is not None:  # a linear-attention layer holds no columns
            cache.layers[number] = reduced.adopt(layer, info.layers.get(number, info.entry).dropped)
    setattr(cache, ATTRIBUTE, info)


def select_rows(cache: Cache, index: Tensor) -> None:
    """Make each row of a cache, and of its bookkeeping, a copy of the row that ``index`` `[R]` names; in place."""
    cache.batch_select_indices(index)
    info = info_of(cache)
    if info is not None:
        layers = {number: prefix.rows(index) for number, prefix in info.layers.items()}
        setattr(cache, ATTRIBUTE, CacheInfo(info.entry.rows(index), layers))


def emptied(cache: Cache) -> list[Any]:
    """Return empty layers of the same kinds as those of a cache, which stay as they are."""
    layers = []
    for layer in cache.layers:
        if isinstance(layer, _Reduced):
            empty: Any = copy.copy(layer)
            empty.keys = empty.values = None
            empty.is_initialized = False
        else:  # the states of linear attention are emptied in place
            empty = copy.deepcopy(layer)
        empty.reset()
        layers.append(empty)
    return layers


def prefix_of_cache(
    cache: Cache, info: CacheInfo | None, mask: Tensor | None, rows: int, device: torch.device
) -> PrefixInfo:
    """Return everything that a filled cache holds, as one prefix; ``mask`` `[B, L]`: the caller's, of all columns."""
    length = cache.get_seq_length()
    empty = PrefixInfo(torch.ones(rows, 0, dtype=torch.long, device=device), False, 0)
    recorded = empty if info is None else info.entry
    tail = recorded.mask.new_ones(rows, length - recorded.length) if mask is None else mask[:, recorded.length : length]
    return PrefixInfo(tail.to(recorded.mask.dtype), mask is not None, tail.shape[1]).after(recorded)


def translate_decode_inputs(
    kwargs: dict[str, Any],
    prefix: PrefixInfo,
    cache: Cache,
    first_position: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Return the arguments of a forward that continues a reduced sequence: mask columns and positions translated.

    Args:
        first_position: the position id of a prompt's first token.
        dtype: of the model.
    """
    kwargs, mask, positions = dict(kwargs), kwargs.get("attention_mask"), kwargs.get("position_ids")
    new_tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    queries = new_tokens.shape[1]
    mask = decode_mask(prefix, mask, cache.get_seq_length() + queries)
    if mask is not None and prefix.dropped < 0:  # transformers has no column that callers do not count
        mask = _explicit(mask, queries, dtype)
    kwargs["attention_mask"] = mask
    if prefix.shift is not None:
        if positions is None:
            if prefix.shift.ndim == 3:
                raise Refusal("renumbered positions with M-RoPE: pass position_ids when decoding by hand")
            positions = torch.arange(queries, device=new_tokens.device) + cache.get_seq_length() + first_position
        kwargs["position_ids"] = moved_back(positions, prefix.shift)
    return kwargs


def moved_back(positions: Tensor, shift: Tensor) -> Tensor:
    """Return position ids minus ``shift``; callers may leave out the plain ids before the axes of M-RoPE."""
    return positions - (shift[-len(positions) :] if positions.ndim == 3 else shift)


def decode_mask(prefix: PrefixInfo, mask: Tensor | None, width: int) -> Tensor | None:
    """Return the 2-D mask of a decode step, `[B, width]`, in the columns that a reduced layer reports.

    Args:
        mask: `[B, L]`, the caller's, over all its columns.
        width: columns of the sequence after this step, as the caller counts.

    Returns:
        ``None`` if there is no padding.
    """
    if mask is None and not prefix.padded:
        return None
    rows = len(prefix.mask)
    tail = prefix.mask.new_ones(rows, width - prefix.length) if mask is None else mask[:, prefix.length :]
    dropped = prefix.mask.new_zeros(rows, max(0, prefix.dropped))  # columns that are reported, but not held, come first
    return torch.cat([dropped, prefix.mask, tail.to(prefix.mask.dtype)], 1)


def _explicit(mask: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """Return the additive causal mask `[B, 1, queries, keys]` of the last queries over the columns `[B, keys]`."""
    keys = mask.shape[1]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    allowed = mask.bool()[:, None, None] & causal
    return torch.zeros(allowed.shape, dtype=dtype, device=mask.device).masked_fill(~allowed, torch.finfo(dtype).min)


def check_cache(cache: Cache | None) -> None:
    """Refuse caches that cannot hold a reduced prompt, before anything runs."""
    if cache is None:
        return
    if cache.is_compileable:
        raise Refusal("a static cache cannot hold a reduced prompt; use the default dynamic cache")
    for layer in cache.layers:
        kind: Any = type(layer)
        if kind not in NO_COLUMNS and reduced_class(kind) is None:
            raise Refusal(f"a cache with {type(layer).__name__} is not supported; use plain DynamicCache layers")
