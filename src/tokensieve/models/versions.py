"""The releases of transformers and torch: which ones are tested, and what differs between those of transformers."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from tokensieve.errors import Refusal
from tokensieve.version import TESTED, tested_range

FIRST_THAT_HANDS_OVER = (5, 18)  # earlier releases hand pixels to the model where the connector stage needs features
FIRST_RELEASE = {
    "smolvlm": (
        (5, 21),
        "older releases refuse prompts whose image tokens are no multiple of a tile's, so reduced ones too",
    ),
}
"""Model types that need a newer transformers than the others: {model type: (release, the reason)}."""


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


def check_release(model_type: str | None = None) -> None:
    """Refuse a transformers that is too old for methods to be attached, or to be attached to this type of model."""
    installed = Version(version("transformers"))
    if installed.release < FIRST_THAT_HANDS_OVER:
        reason, needed = "older releases do not hand encoded images to the model", FIRST_THAT_HANDS_OVER
    elif model_type in FIRST_RELEASE and installed.release < FIRST_RELEASE[model_type][0]:
        needed, reason = FIRST_RELEASE[model_type]
    else:
        return
    subject = "methods" if model_type not in FIRST_RELEASE else f"methods on {model_type!r} models"
    raise Refusal(f"{subject} need transformers {'.'.join(map(str, needed))} or newer; got {installed} ({reason})")


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
