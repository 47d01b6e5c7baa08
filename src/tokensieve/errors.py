"""Whose error it is."""

from __future__ import annotations


def raised_by_us(error: BaseException) -> bool:
    """Whether Tokensieve itself raised it, and not a library underneath."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).startswith("tokensieve")
