"""The base of hosts, which install a fusion method in a cross-modal encoder: hooks, passes and refusals."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokensieve.crossmodal import ModalityStream
from tokensieve.engine.fusion.passes import FusionPass, StreamStep
from tokensieve.errors import Refusal
from tokensieve.methods import FusionMethod

READS_ALL_TEXT = ("MaskedLM", "TokenClassification")  # class names of heads that read a row per text token end so


class FusionInFlight(threading.local):
    """The running call, separately for each thread: the only state that the hooks of one model share.

    Attributes:
        passes: one per image of a sample, so far.
        outputs: {name: `[B, N, H·d]`}, the module outputs that :meth:`Host.record` keeps.
        heads: the number of attention heads of the running layer.
        mask: the additive attention mask that the running layer received.
        residual: `[B, N, D]`, the rows that the MLP's output is added to.
        steps: the decisions about text and image in the running pair of layers.
        raster_order: keeps ViLT's patches in raster order while they are embedded.
    """

    def __init__(self) -> None:
        self.passes: list[FusionPass] = []
        self.outputs: dict[str, Tensor] = {}
        self.heads = 0
        self.mask: Tensor | None = None
        self.residual: Tensor | None = None
        self.steps: tuple[StreamStep | None, StreamStep | None] = (None, None)
        self.raster_order: Any = None


class Host(ABC):
    """A fusion method in a live model, by forward hooks that :meth:`remove` takes away.

    Args:
        on_end: called after each call of the model with its passes (one per image of a sample).
    """

    layer_kind: ClassVar[str]

    def __init__(self, model: Any, method: FusionMethod, on_end: Callable[[list[FusionPass]], None]) -> None:
        self.method = method
        self._on_end = on_end
        self._flight = FusionInFlight()
        self._handles: list[RemovableHandle] = []
        if not method.acts:
            return
        self._check(model)
        self.add_handles(model.register_forward_pre_hook(self._start))
        self.add_handles(model.register_forward_hook(self._finish))
        self.install(getattr(model, model.base_model_prefix, model))

    @abstractmethod
    def install(self, base: Any) -> None:
        """Hook the encoder."""

    @abstractmethod
    def depth(self, model: Any) -> int:
        """Return the number of layers, or of pairs of layers, in which a method could act."""

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def add_handles(self, *handles: RemovableHandle) -> None:
        """Store hook handles for :meth:`remove`."""
        self._handles.extend(handles)

    def record(self, module: nn.Module, name: str) -> None:
        """Record the output of ``module`` in each call, for :meth:`recorded`."""

        def store(module: nn.Module, args: Any, output: Tensor) -> None:
            self._flight.outputs[name] = output

        self.add_handles(module.register_forward_hook(store))

    def recorded(self, name: str, heads: int) -> Tensor:
        """Return a recorded output `[B, N, H·d]` as `[B, H, N, d]`."""
        rows = self._flight.outputs[name]
        return rows.view(*rows.shape[:2], heads, -1).transpose(1, 2)

    @property
    def current(self) -> FusionPass:
        """Return the pass that runs in this thread."""
        running: FusionPass = self._flight.passes[-1]
        return running

    def begin(self, text: Tensor, image: Tensor) -> None:
        """Start a pass; masks `[B, T]` and `[B, I]` are 0 on padding."""
        text_counts, image_counts = text.sum(1).long().tolist(), image.sum(1).long().tolist()
        for row, count in enumerate(text_counts):
            if not count and self.method.layers:
                raise Refusal(f"sample {row} has no text; {self.method.info.name} prunes by the text's attention")
        streams = self.stream(text, text_counts), self.stream(image, image_counts)
        self._flight.passes.append(FusionPass(self.method, *streams))

    def stream(self, mask: Tensor, unpadded: list[int]) -> ModalityStream:
        """Return a stream at the start of a pass; row b of ``mask`` `[B, N]` has ``unpadded[b]`` tokens."""
        counts = (mask.shape[1],) * len(mask) if self.method.counts_padding else tuple(unpadded)
        sizes = torch.ones_like(mask, dtype=torch.float32) if self.method.follows_sizes else None
        return ModalityStream(mask.float(), counts, sizes)

    def _check(self, model: Any) -> None:
        """Refuse wrong layers, and text merges under a head that reads each text token."""
        name, depth = type(model).__name__, self.depth(model)
        for layer in self.method.layers:
            if layer >= depth:
                raise Refusal(f"{name} has {self.layer_kind} 0 to {depth - 1}; got layers={self.method.layers}")
        if self.method.merges_text and name.endswith(READS_ALL_TEXT):
            raise Refusal(f"{name} reads every text token, so text must not merge: give merge_text=0")

    def _start(self, model: Any, args: Any) -> None:
        self._flight.passes, self._flight.outputs = [], {}
        if model.training and getattr(model, "is_activation_checkpointing", False):
            raise Refusal("gradient checkpointing runs layers twice and would reduce twice; turn it off")

    def _finish(self, model: Any, args: Any, output: Any) -> None:
        self._flight.outputs = {}  # they hold the graph of a training step
        self._on_end(self._flight.passes)
