"""Train the net of a method, measure it on held-out questions, and save its folder."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokensieve.engine import attach
from tokensieve.engine.llm import LlmSieve
from tokensieve.engine.nets import load_net, not_finite, save_net, shape_of
from tokensieve.errors import Refusal, first_line
from tokensieve.evaluate import Sample
from tokensieve.loading import DEFAULTS, LoadOptions, device_of, load_model, without_folder
from tokensieve.methods import Method, TrainedMethod, parse
from tokensieve.methods.side import SideBlocks
from tokensieve.train.adapter.data import Collator, Questions, held_out, in_training_order, read_samples, records_digest
from tokensieve.train.adapter.loss import check_method
from tokensieve.train.method.answers import MethodTrainer
from tokensieve.train.method.exits import Exits, agreement, collect, fit
from tokensieve.train.method.places import PlacesCollator, PlacesTrainer
from tokensieve.train.method.recipe import Recipe
from tokensieve.train.method.score import score
from tokensieve.train.method.twig import learn_twig
from tokensieve.train.trainer import check_train_extra, last_checkpoint

log = logging.getLogger(__name__)
SETTINGS, EXAMPLES = "training.json", "{}.safetensors"
SCORED = 300  # held-out questions that are answered


def train_method(
    spec: str | Sequence[Method],
    model: str,
    data: str,
    output: Path,
    *,
    recipe: Recipe | None = None,
    evaluation: str | None = None,
    loading: LoadOptions = DEFAULTS,
    resume: bool = True,
) -> dict[str, Any]:
    """Train the net of one method beside a frozen model; return what is written into ``output/method.json``.

    Args:
        spec: the method with its parameters, such as "visionselector(keep=0.25)", or read already; its budget holds in
            training. Other methods of a pipeline act in training, too: "divprune(keep=0.25) + dyvte".
        model: the model, as for :func:`~tokensieve.loading.load_model`.
        data: questions with answers, as for :func:`~tokensieve.train.adapter.data.read_samples`.
        output: folder of the net, its checkpoints and collected states; ``weights=`` takes it.
        evaluation: questions to measure on; ``None`` holds out a twentieth of the images of ``data``.
        resume: continue from what the folder holds, if it is of the same settings.

    Raises:
        Refusal: before training begins, if method, settings, data and model do not fit together.
        MissingExtra: without the ``train`` extra.
    """
    check_train_extra()
    stages = _stages(spec)
    method = trained_one(stages)
    recipe = recipe or Recipe.of(method.learns)
    if recipe.keeps and (method.info.stage != "connector" or method.budget is None):
        raise Refusal(f"{method.info.name} is trained at one budget; several are for methods before the LLM with keep=")
    samples, unusable = read_samples(data)
    if method.learns == "places" and not any(sample.boxes for sample in samples):
        raise Refusal(f"{method.info.name} learns from boxes, and {data} has none; the bundled questions have some")
    if evaluation is None:
        training, measured = held_out(samples, recipe.seed)
    else:
        training, measured = samples, read_samples(evaluation)[0]
    vlm, processor = load_model(model, loading)
    vlm.requires_grad_(False)
    settings: dict[str, Any] = {
        "trained": " + ".join(map(str, (_by_default(method) if stage is method else stage for stage in stages))),
        "on": without_folder(model),
        "data": without_folder(data),
        "data_digest": records_digest((*training, *measured)),
    }
    settings |= {"recipe": recipe.to_json()}
    _start(output, settings, resume)
    set_seed(recipe.seed)
    started, shape = time.monotonic(), shape_of(vlm)
    net = load_net(method, shape, vlm.get_decoder())

    questions = sorted(measured[:SCORED], key=lambda sample: len(sample.images))  # equal batches, as in training

    def measure(net: nn.Module | None) -> dict[str, float]:
        with attach(vlm, "full") if net is None else _attached(vlm, stages, processor, net) as sieve:
            return score(sieve, processor, questions, recipe.batch_size, recipe.prompt)

    metrics: dict[str, Any] = {"unreduced": measure(None), "untrained": measure(net)}
    if method.learns == "exits":
        learned = _learn_exits(vlm, processor, stages, net, (training, measured), recipe, output)
    elif method.learns == "twig":
        assert isinstance(net, SideBlocks)
        parts = (_questions(training, recipe), Questions(questions))
        learned = learn_twig(vlm, processor, stages, net, parts, recipe, output, resume)
    else:
        with _attached(vlm, stages, processor, net, training=True) as sieve:
            learned = _learn_answers(sieve, processor, sieve.nets[method.info.stage], training, recipe, output, resume)
            net.load_state_dict(sieve.nets[method.info.stage].state_dict())
    if not_finite(net):
        raise Refusal(f"the training diverged: {not_finite(net)} is not finite; give a lower --rate, and --no-resume")
    metrics |= {"trained": measure(net), **learned}
    metrics["skipped"] = metrics.get("skipped", 0) + unusable
    log.info("on %d held-out questions: %s", len(questions), json.dumps(metrics))
    about = {**settings, "metrics": metrics, "seconds": round(time.monotonic() - started)}
    save_net(output, method, shape, net, about)
    return about


def trained_one(stages: Sequence[Method]) -> TrainedMethod:
    """Return the method of a pipeline that has a net; refuse a pipeline with none or two."""
    trained = [stage for stage in stages if isinstance(stage, TrainedMethod)]
    if len(trained) != 1:
        names = " + ".join(map(str, stages))
        raise Refusal(f"a method with a net is trained, such as 'visionselector', one at a time; got {names}")
    return trained[0]


def _stages(spec: str | Sequence[Method]) -> list[Method]:
    """Return the methods of a spec, the trained one with an untrained net."""
    stages = parse(spec) if isinstance(spec, str) else spec
    method = trained_one(stages)
    if method.weights not in ("random", type(method).weights):
        raise Refusal(f"a training starts with an untrained net; leave weights={method.weights!r} out")
    return [replace(method, weights="random") if stage is method else stage for stage in stages]


def _by_default(method: TrainedMethod) -> TrainedMethod:
    """Return the method with its default weights, which are not printed."""
    return replace(method, weights=type(method).weights)


def _attached(
    model: Any, stages: Sequence[Method], processor: Any, net: nn.Module, *, training: bool = False
) -> LlmSieve:
    """Attach methods with a copy of this net; where factors soften attention, with the bias that applies them."""
    method = trained_one(stages)
    by_attention = training and method.learns == "answers" and method.softens == "attention"
    sieve = attach(model, list(stages), processor=processor, repair="size" if by_attention else None)
    assert isinstance(sieve, LlmSieve)
    sieve.nets[method.info.stage].load_state_dict(net.state_dict())
    return sieve


def _learn_answers(
    sieve: LlmSieve,
    processor: Any,
    net: nn.Module,
    samples: Sequence[Sample],
    recipe: Recipe,
    output: Path,
    resume: bool,
) -> dict[str, Any]:
    """Train a net by the answers' loss; return the number of steps and the last loss."""
    questions = _questions(samples, recipe)
    by_places = trained_one(sieve.methods).learns == "places"
    collator = (PlacesCollator if by_places else Collator)(processor, recipe.prompt)
    if not by_places:  # there the answer stands behind the prompt
        check_method(sieve.methods, sieve.model, processor, collator([questions[0]]))
    trainer = (PlacesTrainer if by_places else MethodTrainer)(
        recipe,
        sieve,
        model=net.requires_grad_(True),
        args=recipe.arguments(output, device_of(sieve.model)),
        train_dataset=questions,
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(output) if resume else None)
    if trainer.idle == len(trainer.get_train_dataloader()):
        _forget(output)  # a second call would continue after the last step, and find nothing idle
        raise Refusal(
            f"no image of the data has more tokens than {_by_default(trainer.method)} keeps, so nothing is trained; "
            "lower the budget"
        )
    net.requires_grad_(False).eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"step": trainer.state.global_step, "losses": losses[:1] + losses[-1:], "skipped": len(questions.bad)}


def _questions(samples: Sequence[Sample], recipe: Recipe) -> Questions:
    """Return the questions of a training in its order."""
    listed = in_training_order(samples, recipe.epochs, recipe.seed)
    return Questions(in_equal_batches(listed, recipe.batch_size, recipe.seed))


def in_equal_batches(samples: Sequence[Sample], size: int, seed: int) -> list[Sample]:
    """List samples so that a batch has questions about equally many images, as far as there are enough.

    Each row of a batch is as long as the longest: one question about two images would double the cost of the others.
    """
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(len(sample.images), []).append(sample)
    cut = [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
    whole = [batch for batch in cut if len(batch) == size]
    random.Random(seed).shuffle(whole)
    return [sample for batch in (*whole, *(batch for batch in cut if len(batch) < size)) for sample in batch]


def _learn_exits(
    model: Any,
    processor: Any,
    stages: Sequence[Method],
    net: nn.Module,
    samples: tuple[Sequence[Sample], Sequence[Sample]],
    recipe: Recipe,
    output: Path,
) -> dict[str, Any]:
    """Collect states and labels of the training and the held-out questions, train the gates, and return the shares."""
    parts = []
    for name, part in zip(("training", "held-out"), samples, strict=True):
        file = output / EXAMPLES.format(name)
        examples = Exits.load(file)
        if examples is None:
            listed = sorted(part, key=lambda sample: len(sample.images))
            examples = collect(model, processor, stages, listed, recipe)
            examples.save(file)
        parts.append(examples)
    assert isinstance(net, nn.ModuleList)
    fit(net, parts[0], recipe)
    return agreement(net, parts[1])


def _start(output: Path, settings: dict[str, Any], resume: bool) -> None:
    """Make the folder, empty it of an earlier training unless it is continued, and store the settings.

    Raises:
        Refusal: the folder holds a training of other settings.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / SETTINGS
    if not resume:
        _forget(output)
    elif file.is_file():
        try:
            earlier = dict(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise Refusal(f"cannot read {file} ({first_line(error)}); name another folder, or --no-resume") from None
        before, current = _flat(earlier), _flat(json.loads(json.dumps(settings)))
        current["data_digest"] = current.pop("data_digest")  # last: another seed changes it, too
        other = next((name for name in current if name not in before or before[name] != current[name]), None)
        if other:
            shown = {"trained": "the method", "on": "the model", "data_digest": "digest of the records"}.get(
                other, other
            )
            raise Refusal(
                f"{output} holds another training: {shown} was {before.get(other)!r} and is now {current[other]!r}; "
                "name another folder, or --no-resume"
            )
    part = file.with_suffix(".part")
    part.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    os.replace(part, file)


def _forget(output: Path) -> None:
    """Delete the checkpoints and the collected states of a training."""
    for old in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(old)
    for old in output.glob(EXAMPLES.format("*")):
        old.unlink()


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with those of the recipe beside the others."""
    recipe = settings.get("recipe")
    return {**settings, "recipe": None, **(recipe if isinstance(recipe, dict) else {})}
