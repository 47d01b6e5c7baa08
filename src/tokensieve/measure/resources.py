"""Exact FLOPs and peak activation memory of a call, tracked operator by operator; the bytes of a KV cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

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


def peak_activation_bytes(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Return the most bytes that tensors created during ``call()`` held at one time; weights and inputs do not count.

    On a CUDA device this is the allocator's peak above the allocation before. On a CPU every storage that an operator
    returns is tracked until it is freed; workspaces inside a kernel are not included.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _LiveStorages() as live:
        call()
    return int(live.peak)


def kv_bytes(cache: Any) -> int:
    """Return the bytes of the keys and values of a transformers cache, over all layers."""
    tensors = (t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the storages that operators create, from creation until they are freed.

    Views share their base's storage and cost nothing. A storage that an operator returns unchanged (a weight, an input)
    was not created here and does not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {id(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **kwargs)
        for storage in _storages(out):
            if id(storage) not in inputs and storage not in self._known:
                self._known[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    leaves = [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]
    dense = [part for leaf in leaves for part in ((leaf._indices(), leaf._values()) if leaf.is_sparse else (leaf,))]
    return [tensor.untyped_storage() for tensor in dense]


def _sdpa(query: Shape, key: Shape, value: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count the fused CPU kernel, which torch's registry lacks and would count as 0."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
