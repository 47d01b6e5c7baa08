"""The bundled reference models, their scenes and questions: the defaults if no other model is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokensieve.errors import Refusal

_DIRECTORIES = {
    "reference": "llava-reference",
    "vilt-reference": "vilt-reference",
    "pumer-reference": "pumer-reference",
}
NAMES = tuple(_DIRECTORIES)
ADAPTERS = {"reference-m3": "m3-adapter", "reference-demand-cover": "demand-cover-adapter"}
"""Bundled adapters of the model "reference": {name: directory}."""


def path(name: str = "reference") -> Path:
    """Return the directory of a bundled model, for `from_pretrained`.

    "reference" is a LLaVA, "vilt-reference" a ViLT that answers the same questions, and "pumer-reference" this ViLT
    fine-tuned with PuMer's reduction.
    """
    if name not in _DIRECTORIES:
        raise Refusal(f"bundled model {name!r} is unknown; use one of {', '.join(_DIRECTORIES)}")
    return Path(__file__).parent / "weights" / _DIRECTORIES[name]


def adapter_path(name: str) -> Path | None:
    """Return the directory of a bundled adapter; ``None`` if there is none of this name."""
    return Path(__file__).parent / "weights" / ADAPTERS[name] if name in ADAPTERS else None


def load(name: str = "reference") -> tuple[Any, Any]:
    """Load a bundled model in float32 and eval mode, and its processor, from local files only."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, ViltForQuestionAnswering

    directory = path(name)
    kind: Any = AutoModelForImageTextToText if name == "reference" else ViltForQuestionAnswering
    model = kind.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(directory, local_files_only=True)
