"""Read queries and keys of one attention module while it runs, without eager attention.

A probed module gets a copy of its config that names our attention function. That function reads from the module's own
queries and keys and then calls the kernel that the model is configured with. Masks, weights, the model's config and
every other layer are untouched.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokensieve.engine.inflight import InFlight
from tokensieve.errors import Refusal

Read: TypeAlias = Callable[[Tensor, Tensor, float, Tensor | None, Tensor], Any]
NAME = "tokensieve_probe"


class Probe:
    """Reads one attention module that goes through transformers' attention interface, while it is armed.

    Args:
        attention: the module.
        read: computes a reading from queries and keys `[B, H, N, d]`, their scaling, the mask `[B or 1, 1, N, N]`
            (bool or additive) if there is one, and the values.
        flight: holds the readings.
    """

    def __init__(self, attention: Any, read: Read, flight: InFlight) -> None:
        self.attention, self.read, self.flight = attention, read, flight
        self._install()

    def _install(self) -> None:
        self._config = self.attention.config
        self._eager = getattr(sys.modules[type(self.attention).__module__], "eager_attention_forward", None)
        config = copy.copy(self._config)
        config._attn_implementation_internal = NAME  # the public setter would reach into sub-configs
        self.attention.config, self.attention._tokensieve_probe = config, self

    def remove(self) -> None:
        """Give the module back its own config."""
        self.attention.config = self._config
        del self.attention._tokensieve_probe

    @property
    def armed(self) -> bool:
        return self in self.flight.readings

    def arm(self) -> None:
        """Read in every call of the module from now on, until :meth:`take`."""
        self.flight.readings[self] = []

    def take(self) -> list[Any]:
        """Return the readings since :meth:`arm`, call by call, and disarm."""
        return self.flight.readings.pop(self, [])

    @contextmanager
    def stop_at_reading(self) -> Iterator[None]:
        """Read, and end the forward that runs in this context there: nothing after queries and keys is computed."""
        self.arm()
        self.flight.stop_after_reading = self
        try:
            yield
        except _StopForward:
            pass
        finally:
            self.flight.stop_after_reading = None

    def observe(self, query: Tensor, key: Tensor, scaling: float | None, mask: Tensor | None, value: Tensor) -> None:
        """Read queries, keys and values `[B, H, N, d]`, if armed.

        Raises:
            Refusal: the kernel takes a mask that cannot be read, such as the blocks of flex attention.
        """
        if not self.armed:
            return
        if mask is not None and not isinstance(mask, Tensor):
            raise Refusal(
                f"attention cannot be read under a {type(mask).__name__} ({self._config._attn_implementation}); load "
                "the model with sdpa, eager or a flash kernel, or use a method that reads features only"
            )
        scaling = scaling or query.shape[-1] ** -0.5
        self.flight.readings[self].append(self.read(query.detach(), key.detach(), scaling, mask, value.detach()))
        if self.flight.stop_after_reading is self:
            raise _StopForward

    def forward(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        """Replace the module's attention function: read, then call the kernel that the model is configured with."""
        self.observe(query, key, kwargs.get("scaling"), mask, value)
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(self._config._attn_implementation, self._eager)
        return kernel(module, query, key, value, mask, **kwargs)


class KernelProbe(Probe):
    """Reads one attention module of timm's, which calls torch's own attention kernel: the call is intercepted.

    The arguments of the kernel are read, so norms, rotations and shared keys are included, however the module is built.

    Raises:
        Refusal: if the module does not use the kernel.
    """

    def _install(self) -> None:
        if not self.attention.fused_attn:
            raise Refusal("attention in timm's towers can only be read where it is fused; unset TIMM_FUSED_ATTN")
        self._own_forward, self._forward = vars(self.attention).get("forward"), self.attention.forward
        # a compiled graph would not show the call
        self.attention.forward = torch.compiler.disable(self._intercepted)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        del self.attention.forward
        if self._own_forward is not None:  # another library had put an instance attribute here
            self.attention.forward = self._own_forward

    def _intercepted(self, *args: Any, **kwargs: Any) -> Any:
        if not self.armed:
            return self._forward(*args, **kwargs)
        with _InterceptKernel(self):
            return self._forward(*args, **kwargs)


def probe_of(attention: Any, read: Read, flight: InFlight) -> Probe:
    """Install the probe that fits an attention module."""
    return (KernelProbe if hasattr(attention, "fused_attn") else Probe)(attention, read, flight)


class _StopForward(Exception):
    """The reading is complete; the rest of the forward is not needed."""


class _InterceptKernel(TorchFunctionMode):
    """Shows a probe the arguments of torch's attention kernel in this thread."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            arguments = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            query, key, value = (arguments[name] for name in ("query", "key", "value"))
            self.probe.observe(query, key, arguments.get("scale"), arguments.get("attn_mask"), value)
        return function(*args, **kwargs)


def _probe_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    probe: Probe = module._tokensieve_probe
    return probe.forward(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, _probe_attention)
