"""The weights of a training run of the reference model: new, copied from an earlier model, and exported."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import torch

from tokensieve.errors import Refusal
from tokensieve.reference.learning import Trainee
from tokensieve.reference.model import build_model, build_processor, vocabulary
from tokensieve.reference.places import place_marks

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlavaForConditionalGeneration

MARKS = 0.4  # root mean square of the marks of places; that of a patch embedding is 0.7


def new_trainee(seed: int) -> Trainee:
    """Build a model with its training heads, and with the places of the patches in the tower's position embeddings."""
    model = build_model(seed)
    mark_places(model)
    # on a CPU, eager attention trains faster than SDPA, whose backward is slow
    model.set_attn_implementation("eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Trainee(model)


def copy_weights(directory: Path, model: LlavaForConditionalGeneration) -> None:
    """Copy the weights of an earlier model; words that it lacks keep their new weights.

    Raises:
        Refusal: if its words are not the first words of this model, or another weight has another shape.
    """
    words = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    if sorted(words, key=words.__getitem__) != vocabulary()[: len(words)]:
        raise Refusal(f"{directory} has other words than this recipe, or in another order")
    earlier = type(model).from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    weights = model.state_dict()
    for name, value in earlier.state_dict().items():
        grown = len(words) if name.endswith(("embed_tokens.weight", "lm_head.weight")) else len(value)
        if name not in weights or weights[name][:grown].shape != value.shape:
            raise Refusal(f"{directory} is no earlier model of this recipe: its weight {name} does not fit")
        weights[name][:grown] = value  # a view of the model's own weight
    mark_places(model)  # those of the first generation had none


def mark_places(model: LlavaForConditionalGeneration) -> None:
    """Add the marks of the patches' places to the tower's position embeddings, unless they are there already."""
    table = model.model.vision_tower.embeddings.position_embedding.weight
    marks = place_marks(table.shape[1], MARKS)
    with torch.no_grad():
        if (table * marks).sum() < 0.5 * marks.square().sum():
            table += marks


def export(trainee: Trainee, directory: Path) -> None:
    """Save model and processor for `from_pretrained`; weights are stored in bfloat16 and load as float32."""
    weights = {name: value.bfloat16() for name, value in trainee.model.state_dict().items()}
    part = directory.with_name(directory.name + ".part")
    build_model().save_pretrained(part, state_dict=weights)
    build_processor().save_pretrained(part)
    (part / "model.safetensors").chmod(0o644)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(part, directory)
