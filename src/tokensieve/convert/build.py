"""Turn a checkpoint in LLaVA's original format into a folder that transformers reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlavaForConditionalGeneration

from tokensieve.convert.files import read_checkpoint, read_json
from tokensieve.convert.names import PROJECTOR, has_tower, renamed
from tokensieve.convert.settings import (
    MULTIPLE,
    Tower,
    check_projector,
    check_settings,
    make_config,
    make_processor,
    read_tokenizer,
)
from tokensieve.errors import Refusal
from tokensieve.fusion.convert.fit import check_fit
from tokensieve.loading import find

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint.

    Attributes:
        folder: the new folder.
        weights: number of parameters in it.
        left: names of the tensors that a method adds to LLaVA and that stay in the checkpoint, by what they are.
        without_projector: the checkpoint has none of LLaVA's; that of the folder is zero, and a method takes its place.
    """

    folder: Path
    weights: int
    left: dict[str, list[str]]
    without_projector: bool


def convert_llava(source: Path, target: Path, *, tower: str | None = None, base: Path | None = None) -> Converted:
    """Convert a checkpoint in LLaVA's original format into a folder for ``load_model`` and ``from_pretrained``.

    Args:
        source: folder of a whole model, of a LoRA with its other trained tensors, or of a projector.
        target: folder to write.
        tower: folder or hub name of the CLIP vision encoder. The default is the ``mm_vision_tower`` of the config.json.
            A checkpoint with an encoder of its own keeps it: config and image processor alone are read.
        base: folder of the model that a LoRA or a projector was trained on: Vicuna, or a LLaVA in the original format.

    The vocabulary is padded to a multiple of 64 with the mean of its rows, so that the added logits are never the
    largest. All weights get the dtype of the token embeddings. Memory: files stay on the disk, mapped; a LoRA needs as
    much memory as the weights that it changes.

    Raises:
        Refusal: if something is missing, unexpected, of another shape, or another kind of LLaVA; nothing is written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Refusal(f"{target} exists already; give an empty or a new folder")
    settings = read_json(source / "config.json")
    check_settings(settings, source)
    stored = read_checkpoint(source, base)
    encoder = _find_tower(tower or settings["mm_vision_tower"])
    weights, apart = renamed(stored)
    if not has_tower(stored):
        weights |= {f"model.vision_tower.{name}": tensor for name, tensor in encoder.weights().items()}
    tokenizer = read_tokenizer(source, base)
    for name in (EMBEDDING, HEAD):
        if name in weights:
            weights[name] = _padded(name, weights[name], len(tokenizer))
    config = make_config(settings, encoder, tokenizer, len(weights.get(EMBEDDING, ())))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    without_projector = any(extra.projects for extra in apart)
    if without_projector:
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name.startswith(PROJECTOR)}
        weights |= {name: torch.zeros(shape) for name, shape in shapes.items()}
    else:
        check_projector(settings, source)
    check_fit(weights, model.state_dict(), type(model).__name__)
    processor = make_processor(tokenizer, encoder, settings)
    _write(target, model, weights, processor)
    left = {extra.title: sorted(names) for extra, names in apart.items()}
    return Converted(target, model.num_parameters(), left, without_projector)


def _find_tower(name: str) -> Tower:
    try:
        return Tower(find(name))
    except Refusal as error:  # a config.json can name a folder of its authors
        raise Refusal(f"{error}; give the vision encoder's folder or hub name with --tower") from None


def _padded(name: str, rows: Tensor, tokens: int) -> Tensor:
    """Return `[V', D]`: the rows of the vocabulary, and their mean in each row that is added.

    Raises:
        Refusal: if the tokenizer has more tokens than the vocabulary has rows, apart from ``<image>``.
    """
    if rows.ndim != 2 or tokens - 1 > len(rows):
        raise Refusal(
            f"the tokenizer has {tokens - 1} tokens, but {name} is {list(rows.shape)}: they do not belong together"
        )
    count = -(-max(len(rows), tokens) // MULTIPLE) * MULTIPLE
    mean = rows.mean(0, dtype=torch.float32).to(rows.dtype)
    return torch.cat([rows, mean.expand(count - len(rows), -1)])


def _write(target: Path, model: Any, weights: dict[str, Tensor], processor: Any) -> None:
    dtype = weights[EMBEDDING].dtype
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    text, tokenizer = model.config.text_config, processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    try:
        model.save_pretrained(target)
        processor.save_pretrained(target)
    except OSError as error:
        raise Refusal(f"{target} cannot be written: {error.strerror or os.strerror(error.errno or 0)}") from error
