"""Exact FLOPs of a call, counted operator by operator while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Shape = tuple[int, ...]


def count_flops(call: Callable[[], Any]) -> int:
    """Count the FLOPs of matrix products, convolutions and attention in ``call()`` (a multiply-add is two FLOPs).

    Scaled dot-product attention counts as its two full matrix products, causal or not, as torch counts it on a GPU:
    numbers of different machines agree. Element-wise operators (norms, activations, softmax) are not counted.
    """
    fused_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused_on_cpu: _sdpa}) as counter:
        call()
    return int(counter.get_total_flops())


def _sdpa(query: Shape, key: Shape, value: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count the fused CPU kernel, which torch's registry lacks and would count as 0."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
