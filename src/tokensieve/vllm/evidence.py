"""Read attention and keys in vLLM's vision encoders, with the same readers as under transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather

from tokensieve.methods import Method, Needs
from tokensieve.methods.needs import ReadAttention
from tokensieve.models import TokenLayout
from tokensieve.vllm.families import ServedFamily

Requests = dict[int, dict[str, ReadAttention]]


class EncoderReader:
    """Reads what methods request, in one encode call at a time. Layers that no method requests have no hook.

    Args:
        family, model: vLLM's model, and its family.
        methods: the methods that may be called.
    """

    def __init__(self, family: ServedFamily, model: Any, methods: Iterable[Method]) -> None:
        self.family, self.model = family, model
        vision = {"vision_config": model.config.vision_config.to_dict()}
        self.depth, self.has_cls = family.depth(vision), family.has_cls(model.config)
        self.heads = vision["vision_config"].get("num_attention_heads") or vision["vision_config"]["num_heads"]
        self.requests: Requests = {}  # of the running call; empty outside of one
        self.readings: dict[str, dict[int, Tensor]] = {}
        self.projector_inputs: list[Tensor] = []
        self._reads_patches = False
        self._segments: list[int] | None = None
        layers = {layer for method in methods for layer in self._requests_of([method])}
        attentions = family.attentions(model) if layers else []
        for layer in layers:
            attentions[layer].register_forward_pre_hook(partial(self._read, layer), with_kwargs=True)
        if any(_needs(method).patches for method in methods):
            family.projector(model).register_forward_pre_hook(self._before_projector)

    def begin(self, methods: Sequence[Method], layouts: Sequence[TokenLayout]) -> None:
        """Read what these methods request about images of these layouts, until :meth:`end`."""
        self.requests, self._segments = self._requests_of(methods), self.family.segments(self.model, layouts)
        self._reads_patches = any(_needs(method).patches for method in methods)
        self.readings, self.projector_inputs = {}, []

    def end(self, layouts: Sequence[TokenLayout]) -> tuple[dict[str, dict[int, list[Tensor]]], list[Tensor]]:
        """Return the readings `[M, ...]` per image by evidence and layer, and the rows that entered the projector."""
        by_layer = {
            name: {layer: self.family.units(self.model, rows, layouts) for layer, rows in layers.items()}
            for name, layers in self.readings.items()
        }
        entered = self.projector_inputs
        patches = self.family.patches(self.model, torch.cat(entered), layouts) if entered else []
        self.requests, self.readings, self.projector_inputs, self._reads_patches = {}, {}, [], False
        return by_layer, patches

    def replaces_cls(self, methods: Sequence[Method]) -> bool:
        """Return whether a method requests [CLS] attention of an encoder without [CLS]."""
        needs = list(map(_needs, methods))
        requested = any(n.cls_attention is not None or n.cls_attention_single_head is not None for n in needs)
        return requested and not self.has_cls

    def pixel_hashes(self, methods: Sequence[Method], kwargs: Any, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        """Return the hashes of each image, if a method requests them."""
        requested = any(_needs(method).pixel_hash for method in methods)
        return self.family.pixel_hashes(kwargs, layouts) if requested else []

    def _requests_of(self, methods: Iterable[Method]) -> Requests:
        requests: Requests = {}
        for method in methods:
            for layer, reads in _needs(method).readers_by_layer(self.depth, self.has_cls).items():
                requests.setdefault(layer, {}).update(reads)
        return requests

    def _read(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Read one call of an attention module; queries and keys arrive there after any rotary embedding."""
        if layer not in self.requests:
            return
        arguments = dict(zip(("query", "key"), args, strict=False)) | kwargs
        query, key = (_by_head(arguments[name], module, self.heads) for name in ("query", "key"))
        sizes = self._segments
        for name, read in self.requests[layer].items():
            if sizes is None:
                rows = read(query, key, module.scale, None)
            else:
                parts = zip(torch.split(query, sizes, -2), torch.split(key, sizes, -2), strict=True)
                rows = torch.cat([read(q, k, module.scale, None) for q, k in parts], 1)
            self.readings.setdefault(name, {})[layer] = rows

    def _before_projector(self, projector: Any, args: Any) -> None:
        if self._reads_patches:
            self.projector_inputs.append(args[0])  # some models call it image by image


def _by_head(rows: Tensor, module: Any, in_all: int) -> Tensor:
    """Reshape `[B, N, H·d]` or `[B, N, H, d]` to `[B, H, N, d]`, the heads of all ranks."""
    if rows.ndim == 3:
        rows = rows.view(*rows.shape[:2], module.num_heads, -1)
    heads = rows.transpose(1, 2)
    if heads.shape[1] < in_all:  # other ranks have the others; a reader that joins heads needs all of them
        heads = tensor_model_parallel_all_gather(heads.contiguous(), dim=1)
    return heads


def _needs(method: Method) -> Needs:
    """Return what a method requests at the connector; "full" and "uniform" have the needs of any stage: none."""
    return method.needs if isinstance(method.needs, Needs) else Needs()
