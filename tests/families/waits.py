"""Counts how often a prefill waits for its device, on a machine that has none: ``python waits.py`` prints JSON.

Tensors of a pretended device are handles of CPU tensors. Whatever makes the host wait is seen at the dispatcher: a
value or a copy that is asked for, a shape that depends on values (``nonzero``, boolean indices), and a copy to the
device that is not asynchronous. What a method adds is what a prefill with it counts beyond the same without.

A process of its own, because torch knows the device from then on.
"""

import json
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import tokensieve
from tests.support import families, models, prompts

_setup_privateuseone_for_python_backend("pretend")
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) makes them on the host and then copies
CPU, FAR = torch.device("cpu"), torch.device("pretend:0")
aten = torch.ops.aten
VALUES = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WHOSE = ("tokensieve", "transformers")
SPECS = {
    "features": "divprune(keep=5)",
    "attention": "fastervlm(keep=5)",
    "text": "trsm(keep=5)",
    "inside": "fastv(layer=1, keep=5)",
}


class Far(Tensor):
    """A tensor on the device; ``near`` is what it stands for."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = Tensor._make_wrapper_subclass(cls, near.size(), device=FAR, **layout)
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of Device")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is scaled_dot_product_attention:  # torch would ask which kernels the device has
            args, kwargs = tree_map_only(Far, lambda far: far.near, (args, kwargs or {}))
            return Far(function(*args, **kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return str(self.cpu())


class Device(TorchDispatchMode):
    """Runs what is asked of the device, and notes in ``waits`` where somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        handles: dict[int, Far] = {}

        def near(far):
            handles[id(far.near)] = far
            return far.near

        own, named = tree_map_only(Far, near, (args, dict(kwargs or {})))
        device = named.get("device")
        to_far, to_host = device is not None and device.type == "pretend", device == CPU and bool(handles)
        if to_far:
            named["device"] = CPU
        own = tree_map_only(torch.device, lambda given: CPU, own)
        masks = function in INDEXED and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in own[1])
        sent = to_far and not handles and function is aten._to_copy.default and not named.get("non_blocking")
        across = function is aten.copy_.default and isinstance(args[0], Far) != isinstance(args[1], Far)
        if to_host or sent or across or (handles and (masks or function in VALUES)):
            self.note(function)
        out = function(*own, **named)
        if to_host or not (handles or to_far):
            return out
        return tree_map_only(Tensor, lambda made: handles[id(made)] if id(made) in handles else Far(made), out)

    def note(self, function) -> None:
        frame = sys._getframe(2)
        while frame.f_back and not any(f"/{name}/" in frame.f_code.co_filename for name in WHOSE):
            frame = frame.f_back
        if frame.f_code.co_name != "to_device":  # pinned and asynchronous on a GPU
            self.waits[f"{frame.f_code.co_filename}:{frame.f_lineno} {function}"] += 1


class Made(TorchFunctionMode):
    """``torch.tensor`` of a list of the device's tensors asks for each value."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.tensor:
            args = tree_map_only(Far, lambda far: far.tolist(), args)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def waits(name: str, spec: str | None) -> Counter[str]:
    """Where the prefill of the ragged batch waits."""
    model, inputs = models.build(name, "eager"), prompts.collate(name, prompts.batch(name, "one-and-two"))
    with Device() as device, Made():
        model.to(FAR)
        inputs = {key: value.to(FAR) for key, value in inputs.items()}
        device.waits.clear()
        if spec is None:
            model(**inputs)
        else:
            with tokensieve.attach(model, spec):
                model(**inputs)
    return device.waits


def table(names: list[str]) -> dict[str, dict[str, Any]]:
    """`{family: {kind of method: how many waits it adds, or why it is refused}}`."""
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        plain, rows[name] = waits(name, None).total(), {}
        for kind, spec in SPECS.items():
            try:
                rows[name][kind] = waits(name, spec).total() - plain
            except ValueError as refused:
                rows[name][kind] = str(refused)
    return rows


if __name__ == "__main__":
    print(json.dumps(table(sys.argv[1:] or list(families.FAMILIES))))
