"""Steps of the commands on a loaded model: the spec of its training, its inputs, and notes before long work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokensieve.commands.console import note
from tokensieve.errors import Refusal
from tokensieve.loading import device_of, find, to_model

if TYPE_CHECKING:
    from torch import Tensor

    from tokensieve.evaluate import Sample

COMPARED_WITH = {"pumer-reference": "vilt-reference"}


def note_foreign_images(model: str) -> None:
    """Print a note if a bundled model is about to answer about the user's own pictures."""
    if line := foreign_images(model):
        note(f"note: {line}; name your model with --model")


def foreign_images(model: str) -> str | None:
    """Return a remark on answers of a bundled model about the user's own pictures: it knows its scenes only."""
    from tokensieve.reference import NAMES

    if model not in NAMES or Path(model).exists():
        return None
    return (
        f"the bundled model {model!r} knows only its own drawn scenes ('tokensieve ask' shows one): its "
        "answers about other pictures mean nothing"
    )


def note_crowd(model: Any) -> None:
    """Print a note if the model computes on CPU cores that other processes use, too."""
    import torch

    from tokensieve.measure import cpu_quota, crowd_note, usable_cores

    if device_of(model).type != "cpu":
        return
    crowd = crowd_note(torch.get_num_threads(), len(usable_cores()), cpu_quota())
    if crowd is not None:
        note(f"note: {crowd}")


def trained_spec(name: str, model: Any) -> str:
    """Return the spec that a classifier was fine-tuned with, stored beside its weights by `train pumer`; else PuMer.

    Raises:
        Refusal: it was fine-tuned without a method, and PuMer's defaults do not fit it.
    """
    from tokensieve.engine import attach

    file = Path(find(name).path) / "tokensieve.json"
    if file.is_file():
        try:
            method = json.loads(file.read_text("utf-8"))["method"]
        except (ValueError, KeyError, TypeError):
            raise Refusal(f"{file} is not a file of `tokensieve train pumer`") from None
        if method is not None:
            return str(method)
    try:
        attach(model, "pumer").detach()
    except Refusal as error:
        raise Refusal(
            f"{name} was not fine-tuned with a method, and pumer as it stands does not fit ({error}); name "
            "one, such as 'pumer(layers=(2, 4))'"
        ) from error
    return "pumer"


def inputs_of(model: Any, processor: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return one batch of prompts for a model that generates or classifies answers, on its device and in its dtype."""
    from tokensieve.engine.fusion.families import longest_text
    from tokensieve.evaluate.prompt import encode, encode_pairs

    if model.can_generate():
        inputs = encode(processor, samples)
    else:
        inputs = encode_pairs(processor, samples, longest=longest_text(model.config))
    return to_model(model, inputs)
