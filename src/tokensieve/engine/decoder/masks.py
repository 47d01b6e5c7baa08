"""The attention masks of an LLM's layers: shortened in a prefill, and made anew in decode steps.

A sliding window counts every token that entered the LLM, including those that left inside it: the window is measured
between the places at which tokens entered. The model was trained with that distance, and hiding a token instead of
dropping it leaves the same tokens visible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from tokensieve.engine.cache import PrefixInfo
from tokensieve.engine.prompt.placeholders import ColumnSelection
from tokensieve.errors import Refusal
from tokensieve.methods import Method

FULL, SLIDING = "full_attention", "sliding_attention"
CREATE_MASK = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
EXPLICIT_MASK_KERNELS = ("sdpa", "eager")  # they take a mask of every query and key


def attention_kinds(config: Any) -> list[str]:
    """Return the kind of attention of each layer of an LLM."""
    kind = SLIDING if getattr(config, "sliding_window", None) else FULL
    return list(getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers)


def shorten_mask(mask: Tensor, columns: ColumnSelection) -> Tensor:
    """Select the remaining columns of a mask on both axes, `[B or 1, 1, L, L]` to `[B, 1, n, n]`."""
    index = columns.index
    batch = torch.arange(len(index), device=index.device)[:, None, None]
    # [B, 1, 1], [B, n, 1] and [B, 1, n] broadcast to all pairs of remaining queries and keys
    pairs = mask.expand(len(index), -1, -1, -1)[batch, 0, index[:, :, None], index[:, None]]
    if columns.padded:
        pairs = pairs.masked_fill(~columns.valid[:, None], hidden_value(mask))
    return pairs[:, None]


def limit_to_window(mask: Tensor, prefix: PrefixInfo, cache: Cache, layer: int, window: int) -> Tensor:
    """Hide the keys outside the window in the mask `[B, 1, queries, keys]` of a decode step.

    Args:
        mask: of the last ``window`` columns that the layer's cache holds.
        prefix: the tokens that were dropped before this layer.
    """
    assert prefix.original_columns is not None  # recorded wherever there are windows
    queries, past = mask.shape[-2], cache.get_seq_length(layer)
    keys, first = cache.get_mask_sizes(queries, layer)
    column = torch.arange(past + queries, device=mask.device)
    entered_at = column.repeat(len(prefix.mask), 1)  # [B, columns as the caller counts]: only the prefix has moved
    entered_at[:, prefix.dropped : prefix.length] = prefix.original_columns
    in_window = column[past:, None] - entered_at[:, None, first : first + keys] < window
    return mask.masked_fill(~in_window[:, None], hidden_value(mask))


def check_registers(method: Method, per_layer_masks: bool, kernel: str, repair: str | None) -> None:
    """Refuse registers where the columns that they add cannot be masked."""
    if per_layer_masks or kernel not in EXPLICIT_MASK_KERNELS:
        got = "these layers have different masks" if per_layer_masks else f"this LLM runs {kernel}"
        kernels = " or ".join(EXPLICIT_MASK_KERNELS)
        raise Refusal(
            f"{method} adds columns, which needs one causal mask for all layers and {kernels} attention; {got}"
        )
    if repair is not None:
        raise Refusal(
            f"repair={repair!r} counts the tokens that each token stands for, and registers of {method} have none"
        )


def hidden_value(mask: Tensor) -> float:
    """Return the value that hides a key in this kind of mask."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
