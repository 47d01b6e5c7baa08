"""Counters of this process: images and their visual tokens, before and after reduction, by method."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Sums over the images that one method received.

    Attributes:
        images: the number of images.
        before, after: their visual tokens, without and with the reduction.
    """

    images: int = 0
    before: int = 0
    after: int = 0


_counts: dict[str, Counts] = {}
_lock = threading.Lock()


def add(method: str, before: int, after: int) -> None:
    """Count one image of ``before`` visual tokens, of which ``after`` stayed."""
    with _lock:
        counts = _counts.get(method, Counts())
        _counts[method] = Counts(counts.images + 1, counts.before + before, counts.after + after)


def snapshot() -> dict[str, Counts]:
    """Return {method: its sums since the process began}."""
    with _lock:
        return dict(_counts)
