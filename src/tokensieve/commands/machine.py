"""A look at the machine before long work."""

from __future__ import annotations

from typing import Any

from tokensieve.commands.console import note


def note_crowd(model: Any) -> None:
    """Note on stderr if the model computes on CPU cores that other processes use, too."""
    import torch

    from tokensieve.loading import device_of
    from tokensieve.measure import cpu_quota, crowd_note, usable_cores

    if device_of(model).type != "cpu":
        return
    crowd = crowd_note(torch.get_num_threads(), len(usable_cores()), cpu_quota())
    if crowd is not None:
        note(f"note: {crowd}")
