"""Tune a model with methods attached, save the adapter, and measure it at every budget."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokensieve.engine import attach
from tokensieve.errors import Refusal, first_line
from tokensieve.loading import DEFAULTS, LoadOptions, device_of, load_model, to_model, without_folder
from tokensieve.train.adapter.data import (
    IGNORED,
    Collator,
    Questions,
    held_out,
    in_training_order,
    read_samples,
    records_digest,
)
from tokensieve.train.adapter.loss import FULL, answer_logits, answer_loss, check_method, divergence, teacher_logits
from tokensieve.train.adapter.parts import prepared
from tokensieve.train.adapter.recipe import Recipe
from tokensieve.train.adapter.schedule import Draw, Schedule
from tokensieve.train.trainer import QuietTrainer, check_train_extra, last_checkpoint

log = logging.getLogger(__name__)
RECORD, FORMAT, MODEL = "training.json", 1, "model"


def train_adapter(
    model: str,
    data: str,
    output: Path,
    *,
    recipe: Recipe | None = None,
    evaluation: str | None = None,
    loading: LoadOptions = DEFAULTS,
    resume: bool = True,
) -> dict[str, Any]:
    """Fine-tune a model while methods drop its tokens; return the record that is written beside the adapter.

    The folder receives a standard PEFT adapter (for ``parts="all"`` a whole model in ``output/model``),
    ``training.json`` and checkpoints, which are whole or not used.

    Args:
        model: the model, as for :func:`~tokensieve.loading.load_model`.
        data: questions with answers, as for :func:`~tokensieve.train.adapter.data.read_samples`.
        output: folder of adapter and checkpoints.
        evaluation: questions to measure on; ``None`` holds out a twentieth of the images of ``data``.
        resume: continue from the folder's last whole checkpoint, if it is of the same settings.

    Raises:
        Refusal: before training begins, if settings, data and model do not fit together.
        MissingExtra: without the ``train`` or ``peft`` extra.
    """
    check_train_extra()
    recipe = recipe or Recipe()
    schedule = recipe.schedule()
    if loading.adapter is not None:
        raise Refusal(
            f"a new adapter is trained on the model itself; got the adapter {loading.adapter}: merge it first"
        )
    training, unusable = read_samples(data)
    if evaluation is None:
        training, measured = held_out(training, recipe.seed)
    else:
        measured, more = read_samples(evaluation)
        unusable += more
    vlm, processor = load_model(model, loading)
    questions, held = Questions(in_training_order(training, recipe.epochs, recipe.seed)), Questions(measured)
    collator = Collator(processor, recipe.prompt)
    one = collator([questions[0]])
    for draw in schedule.draws:
        check_method(draw.stages, vlm, processor, one)
        attach(vlm, list(draw.stages), processor=processor).detach()  # what does not fit is refused before training
    settings: dict[str, Any] = {
        "model": without_folder(model),
        "data": without_folder(data),
        "data_digest": records_digest((*training, *measured)),
        "schedule": schedule.to_json(),
    }
    settings |= {"recipe": recipe.to_json(), "loading": loading.to_json()}
    _start(output, settings, resume)
    set_seed(recipe.seed)  # for the random half of new adapters
    tuned = prepared(vlm, recipe, model)
    trainer = AdapterTrainer(
        recipe,
        schedule,
        processor,
        model=tuned,
        args=recipe.arguments(output, device_of(vlm)),
        train_dataset=questions,
        data_collator=collator,
    )
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=last_checkpoint(output) if resume else None)
    record: dict[str, Any] = {**settings, "step": trainer.state.global_step, "skipped": unusable + len(questions.bad)}
    record["seconds"] = round(time.monotonic() - started)  # of this call: a resumed run counts its last part
    record["held_out"] = len(held)
    record["metrics"] = measure(tuned, held, collator, schedule.draws, recipe)
    record["skipped"] += len(held.bad)
    if trainer.is_world_process_zero():
        _save(tuned, processor, output, recipe)
        _write(output, record)
    return record


class AdapterTrainer(QuietTrainer):
    """Train on the answers' loss under the step's methods, and on the divergence from the unreduced base."""

    def __init__(self, recipe: Recipe, schedule: Schedule, processor: Any, **options: Any) -> None:
        self.recipe, self.schedule, self.processor = recipe, schedule, processor
        super().__init__(**options)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **ignored: Any) -> Any:
        inputs, labels = to_model(model, inputs), inputs["labels"]
        recipe, losses = self.recipe, []
        stages_of_step = self.schedule.stages(
            self.state.global_step, self.state.max_steps, recipe.seed, joint=recipe.joint
        )
        with self.accelerator.autocast():  # images are encoded outside of the model's forward, which casts by itself
            teacher = teacher_logits(model, inputs, self.processor) if recipe.distillation else None
            for stages in stages_of_step:
                logits = answer_logits(model, inputs, stages, self.processor)
                loss = answer_loss(logits, labels)
                if teacher is not None:
                    loss = loss + recipe.distillation * divergence(logits, teacher, labels)
                losses.append(loss)
        mean = torch.stack(losses).mean()
        return (mean, {"logits": logits}) if return_outputs else mean

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)  # the records are listed in training order


@torch.no_grad()
def measure(
    model: Any, questions: Questions, collator: Collator, draws: Sequence[Draw], recipe: Recipe
) -> list[dict[str, Any]]:
    """Return loss and accuracy under each draw and unreduced, with the adapter and without it.

    An answer is right if each of its ids is the likeliest one: greedy decoding then gives this answer.
    """
    model.eval()
    untuned = getattr(model, "disable_adapter", None)
    rows = []
    full = Draw("full", FULL)
    for draw in (full, *(draw for draw in draws if draw.name != full.name)):
        row: dict[str, Any] = {"method": draw.name} | _measured(model, questions, collator, draw, recipe)
        if untuned is not None:
            with untuned():
                before = _measured(model, questions, collator, draw, recipe)
            row |= {f"untuned_{name}": value for name, value in before.items()}
        rows.append(row)
    return rows


def _measured(model: Any, questions: Questions, collator: Collator, draw: Draw, recipe: Recipe) -> dict[str, float]:
    right, losses, ids = 0, 0.0, 0
    batches = DataLoader(questions, recipe.batch_size, collate_fn=collator)
    for batch in batches:
        inputs = to_model(model, batch)
        labels = inputs["labels"]
        logits, answered = answer_logits(model, inputs, draw.stages, collator.processor), labels != IGNORED
        count = int(answered.sum())
        losses, ids = losses + float(answer_loss(logits, labels)) * count, ids + count
        right += int(((logits.argmax(-1) == labels) | ~answered).all(-1).sum())
    return {"loss": round(losses / ids, 4), "accuracy": round(right / len(questions), 4)}


def _start(output: Path, settings: dict[str, Any], resume: bool) -> None:
    """Write the settings; refuse to resume a training of others. Without resuming, delete its checkpoints."""
    output.mkdir(parents=True, exist_ok=True)
    if not resume:
        for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(folder)
    elif last_checkpoint(output) is not None:
        try:
            earlier = json.loads((output / RECORD).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise Refusal(
                f"{output} has a checkpoint of another training ({first_line(error)}); use --no-resume"
            ) from None
        settings = json.loads(json.dumps(settings))
        for name, value in settings.items():
            if earlier.get(name) != value:
                raise Refusal(
                    f"{output} has a checkpoint of a training with another {name}; use --no-resume or another folder"
                )
    _write(output, settings)


def _write(output: Path, record: dict[str, Any]) -> None:
    part = output / f"{RECORD}.part"
    part.write_text(json.dumps({"format": FORMAT, **record}, indent=2) + "\n", "utf-8")
    os.replace(part, output / RECORD)


def _save(tuned: Any, processor: Any, output: Path, recipe: Recipe) -> None:
    """Save the adapter's two files, or the whole model, so that a killed run leaves no half-written ones."""
    part = output / "part"
    shutil.rmtree(part, ignore_errors=True)
    tuned.save_pretrained(part)
    if recipe.parts == "all":
        processor.save_pretrained(part)
        shutil.rmtree(output / MODEL, ignore_errors=True)
        os.replace(part, output / MODEL)
        return
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        os.replace(part / name, output / name)
    shutil.rmtree(part)
