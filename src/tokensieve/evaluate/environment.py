"""Where the numbers were taken."""

from __future__ import annotations

from typing import Any


def environment(model: Any) -> dict[str, Any]:
    """Versions, hardware, threads, dtype, attention implementation and the date (UTC); names no host and no path."""
    raise NotImplementedError
