"""METER and BridgeTower: two streams with co-attention; a reducer sits in the text layer of a pair."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokensieve.crossmodal import CrossModal
from tokensieve.engine.fusion.host import Host
from tokensieve.engine.fusion.passes import StreamStep


class CoAttention(Host):
    """Hooks of pairs of co-attention layers, text first.

    Between cross-attention and MLP of the text layer, its text merges by its self-attention keys; the image that it
    looks at is pruned by that look and merged by its cross-attention keys, and so enters the image layer.
    """

    where = "pairs of co-attention layers"
    new_text: ClassVar[bool]  # whether the image layer looks at the text that leaves the text layer, or that entered it

    def depth(self, model: Any) -> int:
        return int(model.config.num_hidden_layers)

    def install(self, base: Any) -> None:
        self._names = list(inspect.signature(type(base).forward).parameters)[1:]
        self.keep(base.register_forward_pre_hook(self._before, with_kwargs=True))
        pairs = zip(base.cross_modal_text_layers, base.cross_modal_image_layers, strict=True)
        for index, (text, image) in enumerate(pairs):
            self.keep(
                text.register_forward_pre_hook(self._text_mask, with_kwargs=True),
                image.register_forward_pre_hook(self._image_inputs, with_kwargs=True),
            )
            if index in self.method.layers:
                self.record(text.attention.self.key, "text_key")
                self.record(text.crossattention.self.query, "query")
                self.record(text.crossattention.self.key, "key")
                self.keep(text.crossattention.register_forward_hook(self._reduce))
        for towers, steps in (("text", "texts"), ("image", "images")):
            for tower in getattr(base, f"cross_modal_{towers}_link_tower", ()):
                self.keep(tower.register_forward_pre_hook(self._linked(steps)))

    def _before(self, base: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        words = torch.ones_like(given["input_ids"]) if mask is None else mask
        self.begin(words, words.new_zeros((len(words), 0)))

    def _text_mask(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give the text layer the mask of the text that is left."""
        now, image = self.current, args[1]
        if not now.image.mask.shape[1]:  # the image is seen for the first time; it has no padding
            now.image = self.stream(image.new_ones(image.shape[:2]), [image.shape[1]] * len(image))
        self._local.steps, self._local.heads = (None, None), layer.attention.self.num_attention_heads
        return args, self._masked(kwargs, "attention_mask", args[0], args[0].shape[1])

    def _reduce(self, attention: nn.Module, args: Any, output: Any) -> Any:
        """Shorten the text that enters the MLP, and remember what to do with the image."""
        now, heads = self.current, self._local.heads
        query, key, text_key = (self.recorded(name, heads) for name in ("query", "key", "text_key"))
        steps = now.reduce(CrossModal(now.text, now.image, query, key, None, text_key, key))
        self._local.steps = steps
        text = steps[0]
        return output if text is None else (text.apply(output[0]), *output[1:])

    def _image_inputs(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give the image layer what is left of both streams."""
        text, image = self._local.steps
        rows, words = args
        rows = rows if image is None else image.apply(rows)
        words = words if text is None or self.new_text else text.apply(words)
        return (rows, words), self._masked(kwargs, "encoder_attention_mask", words, rows.shape[1])

    def _masked(self, kwargs: dict[str, Any], name: str, like: Tensor, queries: int) -> dict[str, Any]:
        now = self.current
        if not (now.texts or now.images or self.method.counts_padding):
            return kwargs
        return {**kwargs, name: now.bias((now.text,), like, queries)}

    def _linked(self, steps: str) -> Any:
        """BridgeTower's links add full rows of one tower to the stream: these take the same way."""

        def shorten(tower: nn.Module, args: Any) -> Any:
            rows, *rest = args
            done: list[StreamStep] = getattr(self.current, steps)
            for step in done:
                rows = step.apply(rows)
            return (rows, *rest)

        return shorten


class Meter(CoAttention):
    new_text = True


class BridgeTower(CoAttention):
    new_text = False
