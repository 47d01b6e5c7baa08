"""The releases of transformers and torch: which ones are tested, and what differs between those of transformers."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from tokensieve.version import TESTED, tested_range


def untested() -> list[str]:
    """Return a remark for each library whose installed release lies outside of the tested range."""
    remarks = []
    for library, (lowest, highest) in TESTED.items():
        installed = version(library)
        if not Version(lowest).release <= Version(installed).release[:2] <= Version(highest).release:
            remarks.append(f"{library} {installed} (tested: {tested_range(library)})")
    return remarks


@cache
def warn_if_untested() -> None:
    """Warn in one line, once in a process, of untested releases of transformers and torch; they may work as well."""
    if remarks := untested():
        warnings.warn(
            f"Tokensieve is not tested with {' and '.join(remarks)}; `tokensieve check` runs the equivalence checks "
            "(laws) on your model",
            stacklevel=3,
        )


# -- differences between releases of transformers ----------------------------------------------------------------------


@cache
def before_5_23() -> bool:
    """Return whether the installed transformers is older than 5.23.

    In those releases, chunked prefill (``prefill_chunk_size``) leaves out the images of a prompt, and gradient
    checkpointing runs the hooks of a layer again in the backward pass.
    """
    return Version(version("transformers")).release < (5, 23)


def checkpoints_activations(model: Any) -> bool:
    """Return whether gradient checkpointing is on in a model; releases before 5.23 have the older name."""
    older = "is_gradient_checkpointing"
    name = "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else older
    return bool(getattr(model, name, False))
