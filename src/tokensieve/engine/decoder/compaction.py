"""Let tokens that leave inside the LLM leave the KV caches of the layers before, too.

The keys that stay keep their positions. The cache of every layer then has the same columns as that of the last one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokensieve.engine.cache import PrefixInfo
from tokensieve.engine.decoder.masks import FULL
from tokensieve.engine.prompt.placeholders import ColumnSelection
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod

Prefixes: TypeAlias = dict[int, PrefixInfo]


def check_compaction(method: DecoderMethod, kinds: set[str], repair: str | None, renumbered: int) -> None:
    """Refuse a model or an option with which earlier caches cannot be shortened.

    Args:
        renumbered: how often positions are numbered anew inside the LLM.
    """
    if kinds != {FULL}:
        raise Refusal(
            f"tokens of {method} leave earlier caches, which needs full attention in every layer; this LLM has "
            f"{', '.join(sorted(kinds))}"
        )
    if repair is not None:
        raise Refusal(f"repair={repair!r} has a bias for each column of a cache, and {method} drops columns of caches")
    if renumbered > 1:
        raise Refusal(
            f"tokens of {method} leave earlier caches more than once, which have other numbers each time: use "
            "positions='original'"
        )


def shorten_caches(cache: Cache | None, count: int, selection: ColumnSelection) -> None:
    """Keep only the selected columns in the first ``count`` layers of a cache, in place."""
    if cache is None:
        return
    for layer in cache.layers[:count]:
        layer.keys, layer.values = _taken(layer.keys, selection), _taken(layer.values, selection)


def prefixes_of_all(prefixes: Prefixes, depth: int, entry: PrefixInfo, contiguous: bool) -> Prefixes:
    """Return the bookkeeping of every layer, from that of the layers after tokens left, `{layer: prefix}`.

    Args:
        depth: layers of the LLM.
        entry: the prefix that the first layer received.
        contiguous: later layers count positions anew; those before kept theirs.
    """
    if not prefixes:
        return prefixes
    last = prefixes[max(prefixes)]
    kept = torch.zeros(len(entry.mask), 1, dtype=torch.bool, device=entry.mask.device)
    before = replace(last, renumbered_rows=kept) if contiguous else last
    return {number: before if number < min(prefixes) else last for number in range(depth)}


def _taken(rows: Tensor, selection: ColumnSelection) -> Tensor:
    """Return the selected columns of keys or values, `[B, heads, n, d]`."""
    index = selection.index.to(rows.device)[:, None, :, None]
    return rows.gather(2, index.expand(-1, rows.shape[1], -1, rows.shape[3]))
