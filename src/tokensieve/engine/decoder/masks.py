"""What a token may attend to: the masks of an LLM's blocks, shortened in a prefill and made anew in later steps.

A sliding window counts every token that entered the LLM, also those that left inside it: by where a token stood when it
entered. It is what the window was trained with, and what hiding a token instead of dropping it would leave visible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from tokensieve.engine.cache import PrefixInfo
from tokensieve.engine.prompt.placeholders import ColumnSelection

FULL, SLIDING = "full_attention", "sliding_attention"
MADE = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
WHOLE = ("sdpa", "eager")  # kernels that are told for every pair of tokens who sees whom


def kinds_of(config: Any) -> list[str]:
    """The kind of attention of each of an LLM's blocks."""
    alike = SLIDING if getattr(config, "sliding_window", None) else FULL
    return list(getattr(config, "layer_types", None) or [alike] * config.num_hidden_layers)


def shortened(mask: Tensor, columns: ColumnSelection) -> Tensor:
    """The mask `[B or 1, 1, L, L]` of a sequence for the columns of it that are left, `[B, 1, n, n]`."""
    index = columns.index
    rows = torch.arange(len(index), device=index.device)[:, None, None]
    taken = mask.expand(len(index), -1, -1, -1)[rows, 0, index[:, :, None], index[:, None]]
    return (taken.masked_fill(~columns.valid[:, None], _least(mask)) if columns.padded else taken)[:, None]


def in_window(mask: Tensor, state: PrefixInfo, cache: Cache, block: int, window: int) -> Tensor:
    """The mask `[B, 1, queries, keys]` of a later step for a block that attends in a window.

    Args:
        mask: what may be seen of the last ``window`` columns that the block's cache holds.
        state: what was dropped before this block.
    """
    assert state.columns is not None  # where there are windows
    queries, seen = mask.shape[-2], cache.get_seq_length(block)
    keys, first = cache.get_mask_sizes(queries, block)
    place = torch.arange(seen + queries, device=mask.device)
    stood = place.repeat(len(state.mask), 1)
    stood[:, state.dropped : state.length] = state.columns
    near = place[seen:, None] - stood[:, None, first : first + keys] < window
    return mask.masked_fill(~near[:, None], _least(mask))


def _least(mask: Tensor) -> float:
    """What stands in a mask where nothing is to be seen."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
