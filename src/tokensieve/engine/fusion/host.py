"""What every cross-modal encoder shares as a host of reducers: its hooks, its passes, what it refuses."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokensieve.crossmodal import ModalityStream
from tokensieve.engine.fusion.passes import FusionPass
from tokensieve.errors import Refusal
from tokensieve.methods import FusionMethod

NEEDS_EVERY_WORD = ("MaskedLM", "TokenClassification")  # heads that read one row per text token


class Host(ABC):
    """Reducers in a live model: forward hooks only, removed by :meth:`remove`.

    Args:
        done: is given the passes (one per image of a sample) of each call of the model, when it ends.
    """

    where: ClassVar[str]

    def __init__(self, model: Any, method: FusionMethod, done: Callable[[list[FusionPass]], None]) -> None:
        self.method = method
        self._done = done
        self._local = _Local()
        self._handles: list[RemovableHandle] = []
        if not method.acts:
            return
        self._check(model)
        self.keep(model.register_forward_pre_hook(self._start))
        self.keep(model.register_forward_hook(self._finish))
        self.install(getattr(model, model.base_model_prefix, model))

    @abstractmethod
    def install(self, base: Any) -> None:
        """Hook the encoder."""

    @abstractmethod
    def depth(self, model: Any) -> int:
        """How many layers, or pairs of them, a reducer could sit in."""

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def keep(self, *handles: RemovableHandle) -> None:
        """Remember hooks, so that :meth:`remove` finds them."""
        self._handles.extend(handles)

    def record(self, module: nn.Module, name: str) -> None:
        """Note the output of ``module`` in each call, for :meth:`recorded`."""

        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            setattr(self._local, name, output.detach())

        self.keep(module.register_forward_hook(note))

    def recorded(self, name: str, heads: int) -> Tensor:
        """What was noted, `[B, N, H·d]`, as `[B, H, N, d]`."""
        rows: Tensor = getattr(self._local, name)
        return rows.view(*rows.shape[:2], heads, -1).transpose(1, 2)

    @property
    def current(self) -> FusionPass:
        """The pass that runs in this thread."""
        running: FusionPass = self._local.passes[-1]
        return running

    def begin(self, text: Tensor, image: Tensor) -> None:
        """A pass begins; masks `[B, T]` and `[B, I]`, 0 on padding."""
        words, tokens = text.sum(1).long().tolist(), image.sum(1).long().tolist()
        for row, count in enumerate(words):
            if not count:
                raise Refusal(f"sample {row} has no text; {self.method.info.name} prunes by what the text looks at")
        streams = self.stream(text, words), self.stream(image, tokens)
        self._local.passes.append(FusionPass(self.method, *streams))

    def stream(self, mask: Tensor, real: list[int]) -> ModalityStream:
        """A stream at the start of a pass; ``real`` tokens per row of ``mask`` `[B, N]`."""
        counts = (mask.shape[1],) * len(mask) if self.method.counts_padding else tuple(real)
        sizes = torch.ones_like(mask, dtype=torch.float32) if self.method.follows_sizes else None
        return ModalityStream(mask.float(), counts, sizes)

    def _check(self, model: Any) -> None:
        """Refuse what cannot be right, before anything runs."""
        name, depth = type(model).__name__, self.depth(model)
        for layer in self.method.layers:
            if layer >= depth:
                raise Refusal(f"{name} has {self.where} 0 to {depth - 1}; got layers={self.method.layers}")
        if self.method.merges_text and name.endswith(NEEDS_EVERY_WORD):
            raise Refusal(f"{name} reads every text token, so text must not merge: give merge_text=0")

    def _start(self, model: Any, args: Any) -> None:
        self._local.passes = []
        if model.training and getattr(model, "is_activation_checkpointing", False):
            raise Refusal("gradient checkpointing runs layers twice and would reduce twice; turn it off")

    def _finish(self, model: Any, args: Any, output: Any) -> None:
        self._done(self._local.passes)


class _Local(threading.local):
    """What one thread's call of the model keeps between hooks."""

    def __init__(self) -> None:
        self.passes: list[FusionPass] = []
