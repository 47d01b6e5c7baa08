"""Train a student with a fusion method attached, from a teacher without, and save it for ``from_pretrained``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import set_seed

from tokensieve.engine import attach
from tokensieve.engine.fusion.families import longest_text
from tokensieve.train.pumer.data import Collator, Records, label_names, read_records
from tokensieve.train.pumer.models import labels_of, load_config, load_processors, load_student, load_teacher
from tokensieve.train.pumer.recipe import PumerTrainer, Recipe
from tokensieve.train.pumer.tasks import task_named
from tokensieve.train.trainer import check_train_extra, last_checkpoint

log = logging.getLogger(__name__)
SPEC_FILE = "tokensieve.json"


def train_pumer(
    task: str,
    model: str,
    data: str,
    output: Path,
    *,
    revision: str | None = None,
    processor: Mapping[str, Any] | None = None,
    teacher: str | None = None,
    evaluation: str | None = None,
    spec: str | None = "pumer",
    recipe: Recipe | None = None,
    resume: bool = True,
) -> dict[str, float]:
    """Fine-tune with a fusion method attached; return the last evaluation's metrics and the number of skipped records.

    Args:
        task: "vqa", "nlvr2", "ve" or "retrieval".
        model: folder or name of the pretrained checkpoint, with its tokenizer and image processor.
        data: training records, as for :func:`~tokensieve.train.pumer.data.read_records`.
        output: folder of checkpoints; the model is saved in ``output/model``, with the spec in ``tokensieve.json``.
        revision: branch, tag or commit of that checkpoint on the hub.
        processor: arguments for its image processor, such as ``{"size": {"shortest_edge": 224}}``.
        teacher: a fine-tuned, unreduced checkpoint to distil from.
        evaluation: records for the accuracy after each epoch; the best epoch is kept.
        spec: the method spec; ``None`` fine-tunes without reduction, to make a teacher.
        resume: continue from the last checkpoint in ``output``, if there is one.

    Raises:
        Refusal: before training begins, if the settings, data and models do not fit together.
        MissingExtra: without the ``train`` extra.
    """
    check_train_extra()
    definition, recipe = task_named(task), recipe or Recipe()
    records = read_records(data, definition)
    known = None if teacher is None else labels_of(load_config(teacher))
    labels = [] if definition.target is None else known or labels_of(load_config(model, revision))
    labels = label_names(records, definition) if labels is None else labels
    tokenizer, image_processor = load_processors(model, revision, processor)
    set_seed(recipe.seed)  # for the random weights of a new head
    student = load_student(model, definition, labels, revision)
    teacher_model = None if teacher is None else load_teacher(teacher, definition, labels)
    numbers = {label: i for i, label in enumerate(labels)}
    negatives = recipe.negatives if definition.target is None else 0
    training = Records(records, definition, numbers, negatives)
    held_out = None
    if evaluation is not None:
        held_out = Records(read_records(evaluation, definition), definition, numbers, negatives)
    trainer = PumerTrainer(
        recipe,
        definition,
        teacher_model,
        model=student,
        args=recipe.arguments(output, evaluates=held_out is not None),
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=Collator(tokenizer, image_processor, longest_text(student.config)),
    )
    last = last_checkpoint(output) if resume else None
    sieve = None if spec is None else attach(student, spec)
    try:
        trainer.train(resume_from_checkpoint=last)
        metrics = trainer.evaluate() if held_out is not None else {}
    finally:
        if sieve is not None:
            sieve.detach()
    if trainer.is_world_process_zero():
        target = output / "model"
        for part in (student, tokenizer, image_processor):
            part.save_pretrained(target)
        (target / SPEC_FILE).write_text(json.dumps({"method": None if sieve is None else str(sieve), "task": task}))
    if training.skipped:
        log.warning("%d of %d training records could not be used", training.skipped, len(training))
    return {**metrics, "skipped": training.skipped}
