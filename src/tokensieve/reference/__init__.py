"""The bundled reference model, its scenes and its questions: what everything runs on when no other model is named."""

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


def path(name: str = "reference") -> Path:
    """Directory of a bundled model, as `from_pretrained` takes it.

    "reference" is a LLaVA, "vilt-reference" a ViLT that answers the same questions, and "pumer-reference" the same one
    fine-tuned with PuMer's reducers on.
    """
    if name not in _DIRECTORIES:
        raise Refusal(f"bundled model {name!r} is unknown; use one of {', '.join(_DIRECTORIES)}")
    return Path(__file__).parent / "weights" / _DIRECTORIES[name]


def load(name: str = "reference") -> tuple[Any, Any]:
    """A bundled model in float32, ready to answer, and its processor. Reads local files only."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, ViltForQuestionAnswering

    directory = path(name)
    kind: Any = AutoModelForImageTextToText if name == "reference" else ViltForQuestionAnswering
    model = kind.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(directory, local_files_only=True)
