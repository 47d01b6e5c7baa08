"""Pretraining of the small reference ViLT, up to where `tokensieve train pumer` takes over.

Two stages. `look`: the image's way through the copied layers is distilled to that of the CLIP tower they came from,
past the marks of place that each patch carries: the tower's features keep no trace of it, a LLaVA's LLM numbers its
tokens. `read`: these layers stay as they are; text and the layers above them learn to answer. Eight questions about an
image share a pass in which patches do not yet see the text, so that they are computed once. As in the reference model,
many questions first see little beyond what they need; and the answer is asked of the last word, where one step of
attention finds it, as well as of the [CLS] that must fetch it from there.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokensieve.reference import load
from tokensieve.reference.learning import MEAN, STD
from tokensieve.reference.model import vocabulary
from tokensieve.reference.packing import IGNORE, SLOTS, TOKENS, Packs, make_packs
from tokensieve.reference.vilt import COPIED, LABELS, WORDS, build_model, build_processor, copy_tower, mark_places

ASKED = tuple(number for number, type in enumerate(SLOTS) if type != "beside")
VALIDATION_SCENES = 128
EASY, EASED = 48, 0.6  # patches while reading is made easy, and the share of the stage in which it is
HIDDEN = -1e4


@dataclass(frozen=True)
class Stage:
    """One part: optimiser steps, images per step, peak learning rate."""

    name: Literal["look", "read"]
    steps: int
    batch: int
    rate: float

    def rate_at(self, step: int) -> float:
        """Learning rate: a short linear rise, then half a cosine down to a twentieth of the peak."""
        warm = max(1, min(200, self.steps // 10))
        if step < warm:
            return self.rate * (step + 1) / warm
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))
        return self.rate * (0.05 + 0.95 * cosine)


STAGES = (Stage("look", 400, 32, 5e-4), Stage("read", 2000, 32, 2e-3))


@dataclass(frozen=True)
class Questions:
    """The questions of `Packs`, one row each.

    tokens `[n, v, Q, L]` (0 is padding) · last `[n, v, Q]`, place of the last word · answers `[n, v, Q]`, labels ·
    asked `[n, v, 144]`, bit `q` set where question `q` must look.
    """

    tokens: Tensor
    last: Tensor
    answers: Tensor
    asked: Tensor

    @classmethod
    def of(cls, packs: Packs) -> Questions:
        """Unpack; questions must not be turned round."""
        words = vocabulary()
        label = torch.tensor([LABELS.index(word) if word in LABELS else IGNORE for word in words])
        scenes, variants, _ = packs.tokens.shape
        tokens = np.zeros((scenes, variants, len(ASKED), WORDS), np.int64)
        lengths = np.zeros((scenes, variants, len(ASKED)), np.int64)
        answers = np.zeros_like(lengths)
        begin = words.index("<s>")
        for n in range(scenes):
            for v in range(variants):
                for q, slot in enumerate(ASKED):
                    (*said, _, answer) = packs.tokens[n, v][packs.slots[n, v] == slot]  # …, "ASSISTANT:", answer
                    tokens[n, v, q, : len(said) + 1] = [begin, *said]
                    lengths[n, v, q], answers[n, v, q] = len(said) + 1, answer
        last = torch.from_numpy(lengths - 2)  # the question mark is the last token
        return cls(
            torch.from_numpy(tokens[..., : lengths.max()]),
            last,
            label[torch.from_numpy(answers)],
            torch.from_numpy(packs.asked),
        )


class Reader(nn.Module):
    """Passes through a stock ViLT in which several questions share an image."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def look(self, images: Tensor) -> list[Tensor]:
        """Images `[B, 120, 120, 3]` uint8 to what enters each copied layer and what leaves the last, `[B, 145, D]`."""
        embeddings = self.model.vilt.embeddings
        patches = embeddings.patch_embeddings(normalised(images)).flatten(2).transpose(1, 2)
        rows = torch.cat([embeddings.cls_token.expand(len(images), -1, -1), patches], 1)
        states = [rows + embeddings.position_embeddings + embeddings.token_type_embeddings.weight[1]]
        for layer in self.model.vilt.encoder.layer[:COPIED]:
            states.append(block(layer, states[-1], states[-1], None))
        return states

    def forward(self, states: list[Tensor], tokens: Tensor, seen: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B, Q, classes]` at the [CLS] and at the last word.

        `states` as `look` gives them, perhaps of fewer patches; `tokens` `[B, Q, L]`; `seen` `[B, Q, I]` bool, the
        image tokens that a question looks at; `last` `[B, Q]`.
        """
        vilt = self.model.vilt
        size, count, length = tokens.shape
        text = vilt.embeddings.text_embeddings(tokens.flatten(0, 1)) + vilt.embeddings.token_type_embeddings.weight[0]
        text = text.view(size, count * length, -1)
        question = torch.arange(count).repeat_interleave(length)
        own = (question[:, None] == question) & (tokens.flatten(1) != 0)[:, None]
        rows = torch.cat([own, seen.repeat_interleave(length, 1)], 2)
        bias = torch.zeros(rows.shape).masked_fill(~rows, HIDDEN).unsqueeze(1)
        for layer, state in zip(vilt.encoder.layer, states[:-1], strict=False):
            text = block(layer, text, torch.cat([text, state.to(text.dtype)], 1), bias)
        words, both = text.shape[1], torch.cat([text, states[-1].to(text.dtype)], 1)
        image = both.shape[1] - words
        below = torch.cat([torch.full((image, words), HIDDEN), torch.zeros(image, image)], 1)
        whole = torch.cat([bias, below.expand(size, 1, -1, -1)], 2)
        for layer in vilt.encoder.layer[COPIED:]:
            both = block(layer, both, both, whole)
        text = vilt.layernorm(both[:, :words]).view(size, count, length, -1)
        found = text.gather(2, last[..., None, None].expand(-1, -1, 1, text.shape[-1])).squeeze(2)
        return self._classify(text[:, :, 0]), self._classify(found)

    def _classify(self, rows: Tensor) -> Tensor:
        pooler = self.model.vilt.pooler
        logits: Tensor = self.model.classifier(pooler.activation(pooler.dense(rows)))
        return logits.float()


def block(layer: Any, rows: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
    """A ViLT layer whose queries are `rows` `[B, N, D]` and whose keys are `context` `[B, K, D]`."""
    inner = layer.attention.attention
    around = layer.layernorm_before(context)
    asking = around if context is rows else layer.layernorm_before(rows)
    query, key, value = (
        part.unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)
        for part in (inner.query(asking), inner.key(around), inner.value(around))
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    attention = (scores if bias is None else scores + bias).softmax(-1).to(value.dtype)
    rows = rows + layer.attention.output.dense((attention @ value).transpose(1, 2).flatten(2))
    out: Tensor = layer.output(layer.intermediate(layer.layernorm_after(rows)), rows)
    return out


def normalised(images: Tensor) -> Tensor:
    """Images `[B, 120, 120, 3]` uint8 as CLIP's image processor gives them, `[B, 3, 120, 120]`."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images.permute(0, 3, 1, 2) / 255.0 - mean) / std


def train_vilt_reference(
    output: Path,
    *,
    scenes: int = 12_000,
    stages: tuple[Stage, ...] = STAGES,
    effort: float = 1.0,
    seed: int = 0,
    resume: bool = True,
    compiled: bool = False,
    report_every: int = 100,
) -> Path:
    """Pretrain; returns the directory with the model, `output / "model"`.

    Every `report_every` steps the state goes to `checkpoint.pt`, from which a later call continues (`resume`), and one
    line of losses and validation accuracies to `metrics.jsonl`. `effort` scales the steps. `compiled` uses
    torch.compile (needs a C++ compiler).
    """
    output.mkdir(parents=True, exist_ok=True)
    if not resume:
        for name in ("checkpoint.pt", "metrics.jsonl"):
            (output / name).unlink(missing_ok=True)
    stages = tuple(replace(stage, steps=max(1, round(stage.steps * effort))) for stage in stages)
    run = _Run(output, stages, scenes, seed, compiled)
    while run.stage < len(stages):
        while run.step < stages[run.stage].steps:
            run.advance()
            if run.step % report_every == 0 or run.step == stages[run.stage].steps:
                run.report()
        run.next_stage()
    return output / "model"


class _Run:
    """State of a run: what is trained, on what, and how far it is."""

    def __init__(self, output: Path, stages: tuple[Stage, ...], scenes: int, seed: int, compiled: bool) -> None:
        self.output, self.stages, self.seed = output, stages, seed
        self.tower = load()[0].model.vision_tower.requires_grad_(False)
        self.packs = make_packs("train", range(scenes), seed=seed, variants=2, turned=0.0)
        self.held_out = make_packs("validation", range(VALIDATION_SCENES), seed=seed, variants=1, turned=0.0)
        self.questions, self.held_out_questions = Questions.of(self.packs), Questions.of(self.held_out)
        self.reader = Reader(build_model(seed))
        copy_tower(self.tower, self.reader.model, normalised(torch.from_numpy(self.packs.images[:256])))
        self.places = mark_places(self.reader.model)
        self.look, self.read = self.reader.look, self.reader.forward
        if compiled:
            self.look, self.read = torch.compile(self.look), torch.compile(self.read)
        self.stage, self.step, self.seconds = 0, 0, 0.0
        self.optimiser = self._new_optimiser()
        if (output / "checkpoint.pt").exists():
            self._restore()
        self.losses: list[float] = []
        self.clock = time.monotonic()

    def advance(self) -> None:
        """One optimiser step; what it draws depends on seed, stage and step alone."""
        stage = self.stages[self.stage]
        rng = np.random.default_rng((self.seed, self.stage, self.step))
        rows = rng.integers(0, len(self.packs), stage.batch)
        images = torch.from_numpy(self.packs.images[rows])
        for group in self.optimiser.param_groups:
            group["lr"] = stage.rate_at(self.step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = self._looking(images) if stage.name == "look" else self._reading(images, rows, rng)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.reader.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.losses.append(loss.item())
        self.step += 1

    def _looking(self, images: Tensor) -> Tensor:
        """Distance to the tower's features and the marks of place, in units of the features' spread, at each layer."""
        with torch.no_grad():
            wanted = [self.tower.pre_layrnorm(self.tower.embeddings(normalised(images)))]
            for layer in self.tower.encoder.layers[:COPIED]:
                wanted.append(layer(wanted[-1], None))
        pairs = zip(self.look(images)[1:], wanted[1:], strict=True)
        return torch.stack([F.mse_loss(a.float(), b.float() + self.places) / b.float().var() for a, b in pairs]).mean()

    def _reading(self, images: Tensor, rows: Any, rng: np.random.Generator) -> Tensor:
        stage, size = self.stages[self.stage], len(rows)
        variant = rng.integers(0, self.questions.tokens.shape[1], size)
        tokens, last, answers, asked = (
            part[rows, variant]
            for part in (self.questions.tokens, self.questions.last, self.questions.answers, self.questions.asked)
        )
        ease = max(0.0, 1 - self.step / (EASED * stage.steps))
        count = EASY if rng.random() < (0.8 if ease else 0.3) else TOKENS
        objects = torch.from_numpy(self.packs.shown[rows]) != IGNORE
        kept = (torch.from_numpy(rng.random((size, TOKENS))) + 0.9 * objects).topk(count).indices.sort(-1).values
        with torch.no_grad():
            places = torch.cat([torch.zeros(size, 1, dtype=torch.long), kept + 1], 1).unsqueeze(-1)
            states = [state.gather(1, places.expand(-1, -1, state.shape[-1])) for state in self.look(images)]
        needed = (asked.gather(1, kept).unsqueeze(1) >> torch.tensor(ASKED).view(1, -1, 1)) & 1
        draw, eased = (torch.from_numpy(rng.random((size, len(ASKED), 1))) for _ in range(2))
        share = torch.where(eased < ease, draw**2, 1.0)
        seen = (needed > 0) | (torch.from_numpy(rng.random((size, len(ASKED), count))) < share)
        seen = torch.cat([torch.ones(size, len(ASKED), 1, dtype=torch.bool), seen], 2)
        logits = self.read(states, tokens, seen, last)
        first, word = (F.cross_entropy(part.flatten(0, 1), answers.flatten()) for part in logits)
        return first + word

    def report(self) -> None:
        """Evaluate, save, and append one line to the metrics."""
        self.seconds += time.monotonic() - self.clock
        stage = self.stages[self.stage]
        line: dict[str, Any] = {"stage": stage.name, "step": self.step, "seconds": round(self.seconds)}
        line["loss"] = round(float(np.mean(self.losses)), 4)
        if stage.name != "look":
            line |= {name: round(value, 4) for name, value in self._evaluate().items()}
        self._save()
        with (self.output / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self.losses, self.clock = [], time.monotonic()

    def next_stage(self) -> None:
        """Export what there is and turn to the next stage."""
        if self.stages[self.stage].name == "read":
            self._centre()
        export(self.reader.model, self.output / "model")
        self.stage, self.step = self.stage + 1, 0
        if self.stage < len(self.stages):
            self.optimiser = self._new_optimiser()

    def _new_optimiser(self) -> torch.optim.Optimizer:
        """AdamW over what the stage trains; the rest is frozen."""
        vilt = self.reader.model.vilt
        embeddings, layers = vilt.embeddings, vilt.encoder.layer
        image = (*embeddings.patch_embeddings.parameters(), embeddings.position_embeddings, embeddings.cls_token)
        seeing = {id(p) for p in (*image, *layers[:COPIED].parameters())}
        looks = self.stages[self.stage].name == "look"
        for parameter in self.reader.parameters():
            parameter.requires_grad_((id(parameter) in seeing) == looks)
        trained = [parameter for parameter in self.reader.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.03, fused=True)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Accuracy by question type on validation scenes with all patches: at the [CLS], and at the last word."""
        hits: dict[str, list[Tensor]] = {}
        asked = self.held_out_questions
        for rows in torch.split(torch.arange(VALIDATION_SCENES), 32):
            images = torch.from_numpy(self.held_out.images[rows.numpy()])
            seen = torch.ones(len(rows), len(ASKED), TOKENS + 1, dtype=torch.bool)
            with torch.autocast("cpu", torch.bfloat16):
                both = self.reader(self.reader.look(images), asked.tokens[rows, 0], seen, asked.last[rows, 0])
            for where, logits in zip(("", " (word)"), both, strict=True):
                right = logits.argmax(-1) == asked.answers[rows, 0]
                for q, slot in enumerate(ASKED):
                    hits.setdefault(SLOTS[slot] + where, []).append(right[:, q])
        return {name: torch.cat(parts).float().mean().item() for name, parts in hits.items()}

    @torch.no_grad()
    def _centre(self) -> None:
        """Make logits log probabilities on average: fine-tuning scores each answer on its own, and starts from that."""
        images, tokens = torch.from_numpy(self.held_out.images[:32]), self.held_out_questions.tokens[:32, 0]
        seen = torch.ones(*tokens.shape[:2], TOKENS + 1, dtype=torch.bool)
        logits, _ = self.reader(self.reader.look(images), tokens, seen, self.held_out_questions.last[:32, 0])
        self.reader.model.classifier[-1].bias -= logits.logsumexp(-1).mean()

    def _save(self) -> None:
        state = {
            "reader": self.reader.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": {"stage": self.stage, "step": self.step, "seconds": self.seconds},
        }
        part = self.output / "checkpoint.part"
        torch.save(state, part)
        os.replace(part, self.output / "checkpoint.pt")

    def _restore(self) -> None:
        state = torch.load(self.output / "checkpoint.pt", weights_only=True)
        self.stage, self.step, self.seconds = (state["progress"][name] for name in ("stage", "step", "seconds"))
        self.reader.load_state_dict(state["reader"])
        self.optimiser = self._new_optimiser()
        self.optimiser.load_state_dict(state["optimiser"])


def export(model: Any, directory: Path) -> None:
    """Write model and processor as a folder that transformers loads: stored in bfloat16, loaded as float32."""
    weights = {name: value.bfloat16() for name, value in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=weights)
    build_processor().save_pretrained(directory)
