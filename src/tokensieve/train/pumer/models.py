"""Load student and teacher: a checkpoint with the task's head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

import tokensieve.fusion.meter  # noqa: F401  (registers METER)
from tokensieve.errors import Refusal, first_line
from tokensieve.loading import check_processor
from tokensieve.train.pumer.tasks import Task


def load_processors(
    checkpoint: str, revision: str | None = None, options: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """Load the tokenizer and the image processor of a checkpoint, from one processor or separately.

    Args:
        revision: branch, tag or commit on the hub.
        options: arguments for the processors.

    Raises:
        Refusal: if one of them is missing, or has no such option.
    """
    options = options or {}
    arguments = {**options, "revision": revision or "main"}
    try:
        processor = AutoProcessor.from_pretrained(checkpoint, **arguments)
        tokenizer, image_processor = processor.tokenizer, processor.image_processor
    except (OSError, ValueError, KeyError, AttributeError):
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, revision=arguments["revision"])
            image_processor = AutoImageProcessor.from_pretrained(checkpoint, **arguments)
        except (OSError, ValueError, KeyError) as error:
            raise Refusal(
                f"{checkpoint} has no tokenizer and image processor beside its weights: {first_line(error)}"
            ) from error
    check_processor(image_processor, options)
    return tokenizer, image_processor


def load_config(checkpoint: str, revision: str | None = None) -> Any:
    """Load the configuration of a checkpoint; refuse in one line if there is none."""
    try:
        return AutoConfig.from_pretrained(checkpoint, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise Refusal(f"no model at {checkpoint}: {first_line(error)}") from error


def labels_of(config: Any) -> list[str] | None:
    """Return the class names of a fine-tuned checkpoint; ``None`` for transformers' placeholders."""
    names = [config.id2label[i] for i in range(len(config.id2label))]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def load_student(checkpoint: str, task: Task, labels: list[str], revision: str | None = None) -> Any:
    """Load a checkpoint with the task's head. A head of another size is replaced by a new one."""
    config, kind = _config(checkpoint, task, revision)
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    return _load(task.models[kind], checkpoint, config, revision=revision or "main", ignore_mismatched_sizes=True)


def load_teacher(checkpoint: str, task: Task, labels: list[str]) -> Any:
    """Load a fine-tuned checkpoint and freeze it.

    Raises:
        Refusal: if it was fine-tuned for other classes or another task.
    """
    config, kind = _config(checkpoint, task)
    if labels and labels_of(config) != labels:
        raise Refusal(f"the teacher {checkpoint} names other classes than the student; use the same data and task")
    expected = task.models[kind].__name__
    if config.architectures and expected not in config.architectures:
        raise Refusal(
            f"the teacher {checkpoint} is a {', '.join(config.architectures)}; {task.name} needs a {expected}"
        )
    return _load(task.models[kind], checkpoint, config).eval().requires_grad_(False)


def _config(checkpoint: str, task: Task, revision: str | None = None) -> tuple[Any, str]:
    config = load_config(checkpoint, revision)
    kind = config.model_type
    if kind not in task.models:
        raise Refusal(f"{checkpoint} is a {kind!r} model; {task.name} is trained with {', '.join(task.models)}")
    return config, kind


def _load(model: Any, checkpoint: str, config: Any, **options: Any) -> Any:
    pairs = "ImagesAndText" in model.__name__
    if pairs:
        config.num_images = 2
    try:
        loaded = model.from_pretrained(checkpoint, config=config, dtype=torch.float32, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise Refusal(f"the model {checkpoint} does not load: {first_line(error)}") from error
    if pairs and config.modality_type_vocab_size == 2:
        _second_image(loaded)
    return loaded


def _second_image(model: Any) -> None:
    """Add a token type for the second image; it starts as a copy of the first image's."""
    base = getattr(model, model.base_model_prefix)
    embeddings = getattr(base, "embeddings", base)  # METER has its token types on the base model
    kinds = embeddings.token_type_embeddings.weight.detach()
    embeddings.token_type_embeddings = nn.Embedding(3, kinds.shape[1], _weight=kinds[[0, 1, 1]].clone())
    model.config.modality_type_vocab_size = 3
