"""The recipe of the bundled reference model, from new weights to the directory that ships.

It has three stages. `tower` trains the vision encoder: CLS lists the things of a scene, and patches name their thing.
`reader` trains projector and language model on the cached features of the frozen encoder, first with objects kept
first, then with random token dropping. `joint` trains all parts, still with dropping, so that the model knows reduced
inputs.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

from tokensieve.errors import Refusal
from tokensieve.reference.card import write_card
from tokensieve.reference.learning import PARTS, Batch, Kept, answering_loss, drop, seeing_loss
from tokensieve.reference.model import vocabulary
from tokensieve.reference.packing import IGNORE, PAIR_SLOTS, SLOTS, TOKENS, make_packs
from tokensieve.reference.vocabulary import COLUMNS, GRID, ROWS
from tokensieve.train.reference_weights import copy_weights, export, new_trainee
from tokensieve.train.stages import Stage, prepare

VALIDATION_SCENES = 256
COUNTS = {TOKENS: 0.4, 48: 0.35, 24: 0.25}  # number of visual tokens that a step keeps, and how often
EASY, EASED = 48, 0.6  # tokens in easy steps, and the share of the reader stage in which steps are easy
END = vocabulary().index("</s>")
POINT_IDS = torch.tensor([[vocabulary().index(word) for word in words] for words in (COLUMNS, ROWS)])
PAIRED = 0.2  # share of the steps that ask about pairs of images
# pointing is learned under original positions only, as real models are that never saw renumbered ones
POINTING = [number for number, type in enumerate(SLOTS) if type == "point"]


STAGES: tuple[Stage, ...] = (
    Stage("tower", 2000, 64, 1e-3, seeing=1.0),
    Stage("reader", 4000, 32, 2e-3),
    Stage("joint", 2000, 32, 8e-4, seeing=0.5),
)


def train_reference(
    output: Path,
    *,
    scenes: int = 32_000,
    stages: tuple[Stage, ...] = STAGES,
    effort: float = 1.0,
    seed: int = 0,
    start: Path | None = None,
    resume: bool = True,
    processes: int = 2,
    compiled: bool = False,
    report_every: int = 250,
    progress: bool = True,
    card: bool = True,
) -> Path:
    """Train the reference model; return the directory of the trained model, `output / "model"`.

    Every `report_every` steps, the state is saved to `checkpoint.pt`, from which a later call continues (`resume`), and
    one line of losses and validation accuracies is added to `metrics.jsonl`. `effort` scales the steps of all stages.
    `start` is the directory of an earlier model of this recipe, perhaps with fewer words, whose weights a new run
    starts from.
    Each of `processes` single-thread processes trains on its share of the scenes and of each batch; gradients are
    averaged, and the result depends on the number of processes. `compiled` uses torch.compile (needs a C++ compiler).
    `card` measures the test split at the end and writes the model's README.md. Takes about 90 KB of memory per scene.

    Raises:
        Refusal: if the output directory holds a run with another seed or number of scenes or processes.
    """
    stages = prepare(output, stages, effort, resume)
    identity = {"seed": seed, "scenes": scenes, "processes": processes}
    if (output / "checkpoint.pt").exists():
        saved = torch.load(output / "checkpoint.pt", weights_only=True)["identity"]
        if saved != identity:
            raise Refusal(f"{output} holds a run with {saved}, got {identity}; or start anew with resume=False")
    arguments = (output, stages, identity, start, compiled, report_every, progress)
    if processes == 1:
        _work(0, *arguments)
    else:
        with tempfile.TemporaryDirectory() as meeting:
            torch.multiprocessing.start_processes(  # type: ignore[attr-defined, no-untyped-call]
                _join, (f"file://{meeting}/meet", *arguments), nprocs=processes
            )
    if card:
        write_card(output / "model", output / "metrics.jsonl")
    return output / "model"


def _join(
    rank: int, meeting: str, output: Path, stages: tuple[Stage, ...], identity: dict[str, int], *options: Any
) -> None:
    """Run as one of several processes."""
    torch.set_num_threads(1)
    processes = identity["processes"]
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    _work(rank, output, stages, identity, *options)
    torch.distributed.destroy_process_group()


def _work(
    rank: int,
    output: Path,
    stages: tuple[Stage, ...],
    identity: dict[str, int],
    start: Path | None,
    compiled: bool,
    report_every: int,
    progress: bool,
) -> None:
    """Train all stages; the first process reports, saves and shows progress."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    run = _Run(rank, output, stages, identity, start, compiled)
    note = TextColumn("{task.fields[note]}")
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), note)
    with Progress(*columns, disable=not progress or rank > 0) as bar:
        while run.stage < len(stages):
            stage = stages[run.stage]
            task = bar.add_task(stage.name, total=stage.steps, completed=run.step, note="")
            while run.step < stage.steps:
                run.advance()
                if rank == 0 and (run.step % report_every == 0 or run.step == stage.steps):
                    bar.update(task, note=run.report())
                bar.update(task, completed=run.step)
            run.next_stage()


class _Run:
    """A training run in a directory: its data, its model and optimiser, and its progress."""

    def __init__(
        self,
        rank: int,
        output: Path,
        stages: tuple[Stage, ...],
        identity: dict[str, int],
        start: Path | None,
        compiled: bool,
    ) -> None:
        self.rank, self.output, self.stages, self.identity = rank, output, stages, identity
        self.processes, self.seed = identity["processes"], identity["seed"]
        self.stage, self.step, self.seconds = 0, 0, 0.0
        self.trainee = new_trainee(self.seed)
        if start is not None:
            copy_weights(start, self.trainee.model)
        self.optimiser = self._new_optimiser()
        self._restore()
        self.packs = make_packs("train", range(rank, identity["scenes"], self.processes), seed=self.seed)
        self.held_out = make_packs("validation", range(VALIDATION_SCENES), variants=1, turned=0.0)
        self.answer = torch.compile(self.trainee.answer, dynamic=False) if compiled else self.trainee.answer
        self.features: Tensor | None = None
        self.losses: dict[str, list[float]] = {}
        self.clock = time.monotonic()

    def advance(self) -> None:
        """Run one optimiser step. Its data and random choices depend only on seed, stage, step and process."""
        stage = self.stages[self.stage]
        common = np.random.default_rng((self.seed, self.stage, self.step))
        rng = np.random.default_rng((self.seed, self.stage, self.step, self.rank))
        size = stage.batch // self.processes
        paired = stage.name != "tower" and common.random() < PAIRED
        texts = self.packs.pairs if paired else self.packs.single
        rows = rng.integers(0, len(texts.tokens), size // 2 if paired else size)
        variants = rng.integers(0, texts.tokens.shape[1], len(rows))
        batch = (Batch.of_pairs if paired else Batch.of)(self.packs, rows, variants)
        for group in self.optimiser.param_groups:
            group["lr"] = stage.rate_at(self.step)
        loss = torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16):
            if stage.name == "reader":
                scenes = torch.from_numpy(np.stack([2 * rows, 2 * rows + 1], 1).flatten() if paired else rows)
                features = self._cached_features()[scenes]
            else:
                features, pooled = self.trainee.see(batch.images)
                seeing = seeing_loss(self.trainee, features, pooled, batch)
                loss = loss + stage.seeing * seeing
                self.losses.setdefault("seeing", []).append(seeing.item())
            if stage.name != "tower":
                ease = max(0.0, 1 - self.step / (EASED * stage.steps)) if stage.name == "reader" else 0.0
                count = EASY if ease else int(common.choice(list(COUNTS), p=list(COUNTS.values())))
                kept = drop(batch, count, rng, ease)
                if not ease and common.integers(2):
                    kept, batch = kept.renumbered(), batch if paired else batch.without(POINTING)
                logits, visual = self.answer(features, kept, batch)
                answering = answering_loss(self.trainee, logits, visual, kept, batch)
                loss = loss + answering
                self.losses.setdefault("answering", []).append(answering.item())
        loss.backward()  # type: ignore[no-untyped-call]
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1

    def _average_gradients(self) -> None:
        if self.processes > 1:
            gradients = [parameter.grad for parameter in self.trainee.parameters() if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            sizes = [gradient.numel() for gradient in gradients]
            parts = torch.split(flat / self.processes, sizes)
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def report(self) -> str:
        """Evaluate, save, append a line to the metrics, and return the losses for the progress bar."""
        self.seconds += time.monotonic() - self.clock
        line: dict[str, str | float] = {"stage": self.stages[self.stage].name, "step": self.step}
        losses = {name: round(float(np.mean(values)), 4) for name, values in self.losses.items()}
        line |= {"seconds": round(self.seconds), **losses}
        line |= {name: round(value, 4) for name, value in self._evaluate().items()}
        self._save()
        with (self.output / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self.losses, self.clock = {}, time.monotonic()
        return ", ".join(f"{name} {value}" for name, value in losses.items())

    def next_stage(self) -> None:
        """Export the model and start the next stage."""
        if self.rank == 0:
            export(self.trainee, self.output / "model")
        self.stage, self.step, self.features = self.stage + 1, 0, None
        if self.stage < len(self.stages):
            self.optimiser = self._new_optimiser()

    def _new_optimiser(self) -> torch.optim.Optimizer:
        """Return AdamW over the parameters that the stage trains; freeze the others."""
        inner, heads = self.trainee.model.model, (self.trainee.patch_head, self.trainee.cls_head)
        seeing = (inner.vision_tower, *heads)
        reading = (inner.multi_modal_projector, inner.language_model, self.trainee.model.lm_head)
        name = self.stages[self.stage].name
        self.trainee.requires_grad_(False)
        for module in {"tower": seeing, "reader": reading, "joint": seeing + reading}[name]:
            module.requires_grad_(True)
        trained = [parameter for parameter in self.trainee.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.03, fused=True)

    @torch.no_grad()
    def _cached_features(self) -> Tensor:
        """Return the features of all training images, `[n, 144, D]` bfloat16; cached, as the encoder is frozen."""
        if self.features is None:
            images = torch.from_numpy(self.packs.images)
            self.features = torch.cat([self.trainee.see(part)[0].bfloat16() for part in torch.split(images, 64)])
        return self.features

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Return the accuracy of the patch head and of each question type on validation scenes, with all tokens."""
        hits: dict[str, list[Tensor]] = {}
        for rows in np.split(np.arange(VALIDATION_SCENES), VALIDATION_SCENES // 64):
            batch = Batch.of(self.held_out, rows, np.zeros_like(rows))
            pairs = rows[::2] // 2
            with torch.autocast("cpu", torch.bfloat16):
                features, _ = self.trainee.see(batch.images)
                parts = self.trainee.patch_head(features).split(PARTS, -1)
                logits, _ = self.trainee.answer(features, Kept.everything(batch), batch)
                paired = Batch.of_pairs(self.held_out, pairs, np.zeros_like(pairs))
                logits_of_pairs, _ = self.trainee.answer(features, Kept.everything(paired), paired)
            for name, part in zip(("shown", "colour", "frame", "neighbour"), parts, strict=True):
                truth = getattr(batch, name)
                hits.setdefault(f"patch {name}", []).append((part.argmax(-1) == truth)[truth != IGNORE])
            for slots, questions, scores in ((SLOTS, batch, logits), (PAIR_SLOTS, paired, logits_of_pairs)):
                for number, type in enumerate(slots):
                    hits.setdefault(type, []).append(_right(questions, scores.argmax(-1), number, type))
        return {name: torch.cat(parts).float().mean().item() for name, parts in hits.items()}

    def _save(self) -> None:
        """Write the checkpoint atomically; if the disk is full, keep the last one and warn."""
        state = {
            "trainee": self.trainee.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": {"stage": self.stage, "step": self.step, "seconds": self.seconds},
            "identity": self.identity,
        }
        part = self.output / "checkpoint.part"
        try:
            torch.save(state, part)
            os.replace(part, self.output / "checkpoint.pt")
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            warnings.warn(f"checkpoint not written, the last good one stays: {error}", stacklevel=2)

    def _restore(self) -> None:
        """Load the checkpoint in the output directory, if there is one."""
        path = self.output / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.stage, self.step, self.seconds = (state["progress"][name] for name in ("stage", "step", "seconds"))
        self.trainee.load_state_dict(state["trainee"])
        self.optimiser = self._new_optimiser()
        self.optimiser.load_state_dict(state["optimiser"])


def _right(batch: Batch, words: Tensor, number: int, type: str) -> Tensor:
    """Return whether the answers to one question of each pack are right, `[B]`, from the next words `[B, L]`.

    Packs without the question are left out.
    """
    answers = (batch.slots == number) & (batch.targets != IGNORE) & (batch.targets != END)
    rows = answers.any(1)
    if type != "point":
        return ((words == batch.targets) | ~answers).all(1)[rows]
    # a point is right on every patch of the thing
    named = words[answers].view(-1, 2, 1) == POINT_IDS
    column, row = named.int().argmax(-1).unbind(1)
    on_thing = (batch.needed[rows].gather(1, (row * GRID + column).unsqueeze(1)).squeeze(1) >> number) & 1
    return named.any(-1).all(1) & (on_thing > 0)
