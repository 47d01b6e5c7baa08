"""METER and BridgeTower: two streams with co-attention. Methods act in the text layer of a pair of layers."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokensieve.crossmodal import CrossModal
from tokensieve.engine.fusion.host import Host
from tokensieve.engine.fusion.passes import StreamStep
from tokensieve.ops import epsilon_attention


class CoAttention(Host):
    """Hooks of pairs of co-attention layers, in which the text layer is first.

    A method acts between the cross-attention and the MLP of the text layer. Text merges by self-attention keys. The
    image is pruned by the text's cross-attention, merges by the cross-attention keys, and then enters the image layer.
    """

    layer_kind = "pairs of co-attention layers"
    new_text: ClassVar[bool]  # the image layer attends to the text layer's output; False: to its input

    def depth(self, model: Any) -> int:
        return int(model.config.num_hidden_layers)

    def install(self, base: Any) -> None:
        self._names = list(inspect.signature(type(base).forward).parameters)[1:]
        self.add_handles(base.register_forward_pre_hook(self._before, with_kwargs=True))
        pairs = zip(base.cross_modal_text_layers, base.cross_modal_image_layers, strict=True)
        for index, (text, image) in enumerate(pairs):
            self.add_handles(
                text.register_forward_pre_hook(self._text_mask, with_kwargs=True),
                image.register_forward_pre_hook(self._image_inputs, with_kwargs=True),
            )
            if self.method.counts_padding:
                self._use_authors_softmax(text.attention.self, "text")
                self._use_authors_softmax(text.crossattention.self, "image")
                self._use_authors_softmax(image.attention.self, "image")
                self._use_authors_softmax(image.crossattention.self, "text")
            if index in self.method.layers:
                self.record(text.attention.self.key, "text_key")
                self.record(text.crossattention.self.query, "query")
                self.record(text.crossattention.self.key, "key")
                self.add_handles(text.crossattention.register_forward_hook(self._reduce))
        for towers, steps in (("text", "texts"), ("image", "images")):
            for tower in getattr(base, f"cross_modal_{towers}_link_tower", ()):
                self.add_handles(tower.register_forward_pre_hook(self._linked(steps)))

    def _use_authors_softmax(self, heads: Any, keys: str) -> None:
        """Replace the output of attention to the stream ``keys``, "text" or "image", by that of PuMer's code."""
        for part in ("query", "key", "value"):
            self.record(getattr(heads, part), part)

        def attend(heads: Any, args: Any, output: Any) -> Any:
            query, key, value = (self.recorded(name, heads.num_attention_heads) for name in ("query", "key", "value"))
            bias = self.current.bias((getattr(self.current, keys),), query, query.shape[2])
            probabilities = heads.dropout(epsilon_attention(query, key, bias).to(value.dtype))
            mixed = (probabilities @ value).transpose(1, 2).flatten(2)
            return mixed if isinstance(output, Tensor) else (mixed, *output[1:])

        self.add_handles(heads.register_forward_hook(attend))

    def _before(self, base: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        mask = inputs.get("attention_mask")
        text_mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        self.begin(text_mask, text_mask.new_zeros((len(text_mask), 0)))

    def _text_mask(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Replace the text layer's mask by that of the text that is left."""
        current, image = self.current, args[1]
        if not current.image.mask.shape[1]:  # the first layer: only now is the image's length known; it has no padding
            current.image = self.stream(image.new_ones(image.shape[:2]), [image.shape[1]] * len(image))
        self._flight.steps, self._flight.heads = (None, None), layer.attention.self.num_attention_heads
        return args, self._masked(kwargs, "attention_mask", args[0], args[0].shape[1])

    def _reduce(self, attention: nn.Module, args: Any, output: Any) -> Any:
        """Reduce the text that enters the MLP, and store both decisions for the image layer."""
        current, heads = self.current, self._flight.heads
        query, key, text_key = (self.recorded(name, heads) for name in ("query", "key", "text_key"))
        bias = current.bias((current.image,), query, query.shape[2])
        steps = current.reduce(CrossModal(current.text, current.image, query, key, bias, text_key, key))
        self._flight.steps = steps
        text = steps[0]
        return output if text is None else (text.apply(output[0]), *output[1:])

    def _image_inputs(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Reduce both inputs of the image layer."""
        text, image = self._flight.steps
        image_rows, text_rows = args
        image_rows = image_rows if image is None else image.apply(image_rows)
        text_rows = text_rows if text is None or self.new_text else text.apply(text_rows)
        return (image_rows, text_rows), self._masked(kwargs, "encoder_attention_mask", text_rows, image_rows.shape[1])

    def _masked(self, kwargs: dict[str, Any], name: str, like: Tensor, queries: int) -> dict[str, Any]:
        """Replace the mask of the text keys in a layer's arguments, if tokens are dropped or merged."""
        current = self.current
        if not (current.texts or current.images or self.method.counts_padding):
            return kwargs
        return {**kwargs, name: current.bias((current.text,), like, queries)}

    def _linked(self, steps: str) -> Any:
        """Return a hook for BridgeTower's links, which add all rows of a unimodal encoder: reduce them alike."""

        def reduce(tower: nn.Module, args: Any) -> Any:
            rows, *remaining = args
            decisions: list[StreamStep] = getattr(self.current, steps)
            for step in decisions:
                rows = step.apply(rows)
            return (rows, *remaining)

        return reduce


class Meter(CoAttention):
    new_text = True


class BridgeTower(CoAttention):
    new_text = False
