"""Exact FLOPs of a call, by watching the operators that run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Shape = tuple[int, ...]


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attention in ``call()`` (a multiply-add is two FLOPs).

    Scaled dot-product attention counts as its two full matrix products, causal or not: what torch counts on a GPU, so
    numbers from different machines agree. Element-wise work (norms, activations, softmax) is not counted.
    """
    fused_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused_on_cpu: _sdpa}) as counter:
        call()
    return int(counter.get_total_flops())


def _sdpa(query: Shape, key: Shape, value: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """torch leaves the fused CPU kernel out of its registry, and so would count it as nothing."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
