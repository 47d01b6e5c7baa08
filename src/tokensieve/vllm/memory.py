"""Decisions that the worker remembers, bounded by their size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from tokensieve.reduction import Mixing, Reduction

OBJECTS = 2_000
"""Bytes of an entry besides its tensors and words, measured roughly: tensors are objects of Python, too."""

WORD = 40
"""Bytes of a word's id in a tuple."""


class Decisions:
    """Decisions by what they depend on. The least recently used are forgotten beyond a number of bytes.

    A merge of 2,880 tokens takes 60 kB, and the choice of 64 tokens 2.5 kB.
    """

    def __init__(self, most_bytes: int = 100_000_000) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._entries: OrderedDict[Any, tuple[Reduction, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: tuple[Any, ...]) -> Reduction | None:
        """Return the decision of a key, and count it as used."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: tuple[Any, ...], decision: Reduction) -> None:
        """Remember a decision, without what no row depends on."""
        mixing, anchors = decision.mixing, decision.anchors.clone()  # a view would hold the tensors of its whole batch
        if mixing is not None:
            mixing = Mixing(mixing.slot.clone(), mixing.source.clone(), mixing.weight.clone())
        tensors: list[Tensor] = [anchors, *(vars(mixing).values() if mixing is not None else ())]
        words = sum(len(part) for part in key if isinstance(part, tuple))
        size = OBJECTS + WORD * words + sum(tensor.nbytes for tensor in tensors)
        self.bytes += size - self._entries.pop(key, (None, 0))[1]
        self._entries[key] = replace(decision, anchors=anchors, mixing=mixing, scores=None, notes=()), size
        while self.bytes > self.most_bytes:
            _, (_, forgotten) = self._entries.popitem(last=False)
            self.bytes -= forgotten

    def items(self) -> Iterator[tuple[Any, Reduction]]:
        """Yield keys and decisions, the least recently used first."""
        return ((key, decision) for key, (decision, _) in self._entries.items())
