"""Train blocks that run beside a frozen LLM: they predict the answer from the states that enter one of its layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from tokensieve.engine import attach
from tokensieve.engine.decoder.side import run_beside
from tokensieve.evaluate.prompt import generate_arguments, without_repetitions
from tokensieve.loading import device_of, to_model
from tokensieve.methods import Method, parse
from tokensieve.methods.side import SideBlocks
from tokensieve.train.adapter.data import IGNORED, Collator, Questions
from tokensieve.train.adapter.loss import answer_loss, check_method, divergence
from tokensieve.train.method.recipe import Recipe
from tokensieve.train.trainer import QuietTrainer, last_checkpoint

Batch = dict[str, Tensor]


class Twig(nn.Module):
    """The blocks with copies of the LLM's final norm and output head, which are trained with them.

    Args:
        blocks: the net of the method; it is trained in place.
        vlm: the frozen model.
    """

    def __init__(self, blocks: SideBlocks, vlm: Any) -> None:
        super().__init__()
        self.blocks = blocks
        self.norm: nn.Module = copy.deepcopy(vlm.get_decoder().norm)
        self.head: nn.Module = copy.deepcopy(vlm.get_output_embeddings())
        self.float().requires_grad_(True)

    def forward(self, hidden: Tensor, arguments: dict[str, Any], width: int) -> Tensor:
        """Return the logits `[B, width - 1, V]` of the last ids, from the input of the layer that was copied first."""
        rows = run_beside(self.blocks, hidden, arguments)[:, -width:-1]
        logits: Tensor = self.head(self.norm(rows))
        return logits.float()


class TwigTrainer(QuietTrainer):
    """Train on the loss of the answers that the twig predicts, and its divergence from the whole model.

    Args:
        vlm: the frozen model, with the methods attached that act before the LLM.
    """

    def __init__(self, recipe: Recipe, vlm: Any, **options: Any) -> None:
        self.recipe, self.vlm = recipe, vlm
        super().__init__(**options)

    def compute_loss(self, model: Any, inputs: Batch, return_outputs: bool = False, **ignored: Any) -> Any:
        first = self.model.blocks.sizes["layer"]
        hidden, arguments, teacher = states(self.vlm, first, inputs, whole=self.recipe.distillation > 0)
        labels = inputs["labels"]
        logits = model(hidden, arguments, labels.shape[1] + 1)  # each id is predicted by the column before
        loss = answer_loss(logits, labels)
        if teacher is not None:
            loss = loss + self.recipe.distillation * divergence(logits, teacher, labels)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)  # the records are listed in training order


@torch.no_grad()
def states(vlm: Any, layer: int, inputs: Batch, *, whole: bool = False) -> tuple[Tensor, dict[str, Any], Tensor | None]:
    """Return what enters a layer of the LLM: hidden states `[B, n, D]`, and its other arguments.

    Args:
        inputs: a batch of :class:`~tokensieve.train.adapter.data.Collator`.
        whole: return the logits `[B, A, V]` of the answers by the whole model, too; else the forward ends there.
    """
    entered: list[tuple[Tensor, dict[str, Any]]] = []

    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(kwargs)
        entered.append((args[0] if args else arguments.pop("hidden_states"), arguments))
        if not whole:
            raise _Entered

    prompts = {name: rows for name, rows in inputs.items() if name not in ("labels", "image_numbers")}
    once = without_repetitions(vlm, to_model(vlm, prompts), inputs["image_numbers"].tolist())
    logits, width = None, inputs["labels"].shape[1] + 1
    handle = vlm.get_decoder().layers[layer].register_forward_pre_hook(read, with_kwargs=True)
    try:
        output = vlm(**generate_arguments(vlm, once), logits_to_keep=width, use_cache=False)
        logits = output.logits[:, :-1].float()
    except _Entered:
        pass
    finally:
        handle.remove()
    ((hidden, arguments),) = entered
    return hidden, arguments, logits


def learn_twig(
    vlm: Any,
    processor: Any,
    stages: Sequence[Method],
    blocks: SideBlocks,
    questions: tuple[Questions, Questions],
    recipe: Recipe,
    output: Path,
    resume: bool,
) -> dict[str, Any]:
    """Train the blocks in place; return the number of steps, the losses, and how many held-out answers are the twig's.

    Args:
        stages: methods that act before the LLM, and the method of the blocks, last.
        questions: of the training, and held out.
    """
    before, (training, measured) = list(stages[:-1]), questions
    collator = Collator(processor, recipe.prompt)
    check_method(before, vlm, processor, collator([training[0]]))
    with attach(vlm, before or parse("full"), processor=processor):
        trainer = TwigTrainer(
            recipe,
            vlm,
            model=Twig(blocks, vlm),
            args=recipe.arguments(output, device_of(vlm)),
            train_dataset=training,
            data_collator=collator,
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(output) if resume else None)
        twig = trainer.model.requires_grad_(False).eval()
        batches = range(0, len(measured), recipe.batch_size)
        parts = [
            [measured[i] for i in range(start, min(start + recipe.batch_size, len(measured)))] for start in batches
        ]
        right = torch.cat([answered(vlm, twig, collator(part)) for part in parts]).float().mean()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    about = {"step": trainer.state.global_step, "losses": losses[:1] + losses[-1:], "skipped": len(training.bad)}
    return {**about, "twig_right": round(right.item(), 4)}


def answered(vlm: Any, twig: Twig, inputs: Batch) -> Tensor:
    """Return whether the twig predicts every id of the answer, `[B]` bool on the CPU."""
    hidden, arguments, _ = states(vlm, twig.blocks.sizes["layer"], inputs)
    labels = inputs["labels"].to(hidden.device)
    words: Tensor = twig(hidden, arguments, labels.shape[1] + 1).argmax(-1)
    right: Tensor = (words == labels) | (labels == IGNORED)
    return right.all(-1).cpu()


class _Entered(Exception):
    """The states are there; the rest of the forward is not needed."""
