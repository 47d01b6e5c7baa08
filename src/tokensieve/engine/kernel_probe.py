"""Attention rows of modules that call torch's own attention kernel, as timm's do: the call is watched on its way.

What the kernel is called with is what counts: norms, rotations and shared keys are in it, whatever the module is made
of, and nothing is computed twice.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tokensieve.engine.probe import Probe, Read
from tokensieve.errors import Refusal


def probe_of(attention: Any, read: Read) -> Probe:
    """The probe that fits an attention module."""
    return (KernelProbe if hasattr(attention, "fused_attn") else Probe)(attention, read)


class KernelProbe(Probe):
    """Reads one attention module of timm's, while armed in this thread.

    Raises:
        ValueError: if the module does not use the kernel.
    """

    def __init__(self, attention: Any, read: Read) -> None:
        if not attention.fused_attn:
            raise Refusal("attention in timm's towers can only be read where it is fused; unset TIMM_FUSED_ATTN")
        self.attention, self.read = attention, read
        self._local = threading.local()
        self._own, self._forward = vars(attention).get("forward"), attention.forward
        # a compiled graph would not show the call
        attention.forward = torch.compiler.disable(self._watched)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        del self.attention.forward
        if self._own is not None:  # somebody else's
            self.attention.forward = self._own

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        if not self.armed:
            return self._forward(*args, **kwargs)
        with _Watch(self):
            return self._forward(*args, **kwargs)


class _Watch(TorchFunctionMode):
    """Shows a probe what torch's attention kernel is called with in this thread."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            self.probe.see(given["query"], given["key"], given.get("scale"), given.get("attn_mask"))
        return function(*args, **kwargs)
