"""ViLT: one stream of text, image [CLS] and patches. Methods act between the attention and the MLP of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokensieve.crossmodal import CrossModal
from tokensieve.engine.fusion.host import Host
from tokensieve.ops import epsilon_attention


class Vilt(Host):
    """Hooks of a stock transformers ViLT with any head on the pooled text [CLS].

    ViLT shuffles the patches of an image in each call, and bipartite matching pairs tokens by their place. While a
    method is attached, patches enter in raster order, so that a call is repeatable and a row does not depend on its
    batch. The same patches are selected, and the random generator is used as before.
    """

    layer_kind = "layers"

    def depth(self, model: Any) -> int:
        return int(model.config.num_hidden_layers)

    def install(self, base: Any) -> None:
        self.add_handles(
            base.embeddings.register_forward_pre_hook(self._before_embedding),
            base.embeddings.register_forward_hook(self._after_embedding, always_call=True),
        )
        for index, layer in enumerate(base.encoder.layer):
            attention = layer.attention.attention
            self.add_handles(layer.register_forward_pre_hook(self._mask))
            if index in self.method.layers or self.method.counts_padding:
                self.record(attention.query, "query")
                self.record(attention.key, "key")
                self.add_handles(attention.register_forward_pre_hook(self._note_heads))
            if self.method.counts_padding:
                self.add_handles(attention.dropout.register_forward_pre_hook(self._authors_softmax))
            if index in self.method.layers:
                self.add_handles(
                    layer.layernorm_after.register_forward_pre_hook(self._reduce),
                    layer.output.register_forward_pre_hook(self._residual),
                )

    def _before_embedding(self, embeddings: nn.Module, args: Any) -> None:
        self._flight.raster_order = _RasterOrder()
        self._flight.raster_order.__enter__()

    def _after_embedding(self, embeddings: nn.Module, args: Any, output: Any) -> None:
        self._flight.raster_order.__exit__(None, None, None)
        if output is not None:  # None if the embedding raised
            text_length = args[1].shape[1]
            self.begin(output[1][:, :text_length], output[1][:, text_length:])

    def _mask(self, layer: nn.Module, args: Any) -> Any:
        """Replace the layer's mask by that of the tokens that are left."""
        hidden, mask, *remaining = args
        current = self.current
        if current.texts or current.images or self.method.counts_padding:
            mask = current.bias((current.text, current.image), hidden, hidden.shape[1])
        self._flight.mask = mask
        return (hidden, mask, *remaining)

    def _note_heads(self, attention: Any, args: Any) -> None:
        self._flight.heads = attention.num_attention_heads

    def _authors_softmax(self, dropout: nn.Module, args: Any) -> Tensor:
        """Replace the attention probabilities by those that PuMer's code computes."""
        query, key = self._query_key()
        assert self._flight.mask is not None  # padding counts, so `_mask` has made one
        return epsilon_attention(query, key, self._flight.mask).to(args[0].dtype)

    def _query_key(self) -> tuple[Tensor, Tensor]:
        return self.recorded("query", self._flight.heads), self.recorded("key", self._flight.heads)

    def _reduce(self, norm: nn.Module, args: Any) -> Any:
        """Reduce both streams in the MLP's input `[B, N, D]`."""
        (hidden,), current = args, self.current
        text_length = current.text.mask.shape[1]
        query, key = self._query_key()
        mask = self._flight.mask
        text, image = current.reduce(
            CrossModal(
                text=current.text,
                image=current.image,
                query=query[:, :, :text_length],
                key=key,
                bias=None if mask is None else mask[:, :, :text_length],
                text_key=key[:, :, :text_length],
                image_key=key[:, :, text_length:],
            )
        )
        streams = zip(hidden.split([text_length, hidden.shape[1] - text_length], 1), (text, image), strict=True)
        reduced = [rows if step is None else step.apply(rows) for rows, step in streams]
        self._flight.residual = torch.cat(reduced, 1)
        return (self._flight.residual,)

    def _residual(self, output: nn.Module, args: Any) -> Any:
        """Replace the MLP's residual input by the reduced rows."""
        residual, self._flight.residual = self._flight.residual, None
        return args[0], residual


class _RasterOrder(TorchFunctionMode):
    """Sort draws without replacement: ViLT's random patch order becomes the raster order."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        replacement = (kwargs or {}).get("replacement", False)
        return result.sort().values if func is torch.multinomial and not replacement else result
