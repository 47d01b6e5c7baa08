"""Pretraining of the small reference ViLT, up to where `tokensieve train pumer` takes over.

It has two stages. `look` distils the copied layers to the CLIP encoder that they were copied from. Each patch also
carries marks of its place, because the encoder's features do not depend on it (a LLaVA's LLM numbers its tokens
instead). `read` freezes these layers; the text embeddings and the layers above learn to answer. Eight questions about
an image share one pass, in which patches do not attend to text in the copied layers and are computed once. As in the
reference model, many questions first attend to few tokens that they do not depend on. The answer is trained at the last
word, which finds it in one step of attention, and at [CLS], which must fetch it from there.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokensieve.reference import load, vilt
from tokensieve.reference.learning import normalised, visible_tokens
from tokensieve.reference.model import vocabulary
from tokensieve.reference.packing import IGNORE, SLOTS, TOKENS, Packs, make_packs
from tokensieve.reference.vilt import COPIED, LABELS, WORDS, build_model, build_processor, copy_tower, mark_places
from tokensieve.train.stages import Stage, prepare

ASKED = tuple(number for number, type in enumerate(SLOTS) if type in vilt.ASKED)
VALIDATION_SCENES = 128
EASY, EASED = 48, 0.6  # patches in easy steps, and the share of the stage in which steps are easy
HIDDEN = -1e4


STAGES = (Stage("look", 400, 32, 5e-4), Stage("read", 2000, 32, 2e-3))


@dataclass(frozen=True)
class Questions:
    """The questions of `Packs`, one row each.

    Attributes:
        tokens: `[n, v, Q, L]`; 0 is padding.
        last: `[n, v, Q]`, position of the last word.
        answers: `[n, v, Q]`, labels.
        needed: `[n, v, 144]`, bit `q` is set on the patches that question `q` depends on.
    """

    tokens: Tensor
    last: Tensor
    answers: Tensor
    needed: Tensor

    @classmethod
    def of(cls, packs: Packs) -> Questions:
        """Unpack packs without turned questions."""
        words = vocabulary()
        label = torch.tensor([LABELS.index(word) if word in LABELS else IGNORE for word in words])
        scenes, variants, _ = packs.single.tokens.shape
        tokens = np.zeros((scenes, variants, len(ASKED), WORDS), np.int64)
        lengths = np.zeros((scenes, variants, len(ASKED)), np.int64)
        answers = np.zeros_like(lengths)
        begin = words.index("<s>")
        for n in range(scenes):
            for v in range(variants):
                for q, slot in enumerate(ASKED):
                    (*words_of, _, answer) = packs.single.tokens[n, v][
                        packs.single.slots[n, v] == slot
                    ]  # …, "ASSISTANT:", answer
                    tokens[n, v, q, : len(words_of) + 1] = [begin, *words_of]
                    lengths[n, v, q], answers[n, v, q] = len(words_of) + 1, answer
        last = torch.from_numpy(lengths - 2)  # the question mark is the last token
        return cls(
            torch.from_numpy(tokens[..., : lengths.max()]),
            last,
            label[torch.from_numpy(answers)],
            torch.from_numpy(packs.single.needed),
        )


class Reader(nn.Module):
    """Run a stock ViLT so that several questions share the pass over an image."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def look(self, images: Tensor) -> list[Tensor]:
        """Encode images `[B, 120, 120, 3]`; return the states before and after each copied layer, `[B, 145, D]`."""
        embeddings = self.model.vilt.embeddings
        patches = embeddings.patch_embeddings(normalised(images)).flatten(2).transpose(1, 2)
        rows = torch.cat([embeddings.cls_token.expand(len(images), -1, -1), patches], 1)
        states = [rows + embeddings.position_embeddings + embeddings.token_type_embeddings.weight[1]]
        for layer in self.model.vilt.encoder.layer[:COPIED]:
            states.append(block(layer, states[-1], states[-1], None))
        return states

    def forward(self, states: list[Tensor], tokens: Tensor, visible: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[B, Q, classes]` at [CLS] and at the last word.

        `states` are those of `look`, perhaps of fewer patches. `tokens` is `[B, Q, L]`, `last` `[B, Q]`; `visible`
        `[B, Q, I]` bool marks the image tokens that a question attends to.
        """
        vilt = self.model.vilt
        size, count, length = tokens.shape
        text = vilt.embeddings.text_embeddings(tokens.flatten(0, 1)) + vilt.embeddings.token_type_embeddings.weight[0]
        text = text.view(size, count * length, -1)
        question = torch.arange(count).repeat_interleave(length)
        same_question = (question[:, None] == question) & (tokens.flatten(1) != 0)[:, None]
        allowed = torch.cat([same_question, visible.repeat_interleave(length, 1)], 2)
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, HIDDEN).unsqueeze(1)
        # copied layers: text attends to the image's states, which were computed without text
        for layer, state in zip(vilt.encoder.layer, states[:-1], strict=False):
            text = block(layer, text, torch.cat([text, state.to(text.dtype)], 1), bias)
        text_length, rows = text.shape[1], torch.cat([text, states[-1].to(text.dtype)], 1)
        image_length = rows.shape[1] - text_length
        # upper layers: both streams in one sequence, but image rows attend to no question
        image_bias = torch.cat(
            [torch.full((image_length, text_length), HIDDEN), torch.zeros(image_length, image_length)], 1
        )
        full_bias = torch.cat([bias, image_bias.expand(size, 1, -1, -1)], 2)
        for layer in vilt.encoder.layer[COPIED:]:
            rows = block(layer, rows, rows, full_bias)
        text = vilt.layernorm(rows[:, :text_length]).view(size, count, length, -1)
        last_rows = text.gather(2, last[..., None, None].expand(-1, -1, 1, text.shape[-1])).squeeze(2)
        return self._classify(text[:, :, 0]), self._classify(last_rows)

    def _classify(self, rows: Tensor) -> Tensor:
        pooler = self.model.vilt.pooler
        logits: Tensor = self.model.classifier(pooler.activation(pooler.dense(rows)))
        return logits.float()


def block(layer: Any, rows: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
    """Run a ViLT layer with queries from `rows` `[B, N, D]` and keys from `context` `[B, K, D]`."""
    inner = layer.attention.attention
    normed_context = layer.layernorm_before(context)
    normed_rows = normed_context if context is rows else layer.layernorm_before(rows)
    query, key, value = (
        part.unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)
        for part in (inner.query(normed_rows), inner.key(normed_context), inner.value(normed_context))
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    attention = (scores if bias is None else scores + bias).softmax(-1).to(value.dtype)
    rows = rows + layer.attention.output.dense((attention @ value).transpose(1, 2).flatten(2))
    out: Tensor = layer.output(layer.intermediate(layer.layernorm_after(rows)), rows)
    return out


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
    """Pretrain the reference ViLT; return the directory of the model, `output / "model"`.

    Every `report_every` steps, the state is saved to `checkpoint.pt`, from which a later call continues (`resume`), and
    one line of losses and validation accuracies is added to `metrics.jsonl`. `effort` scales the steps. `compiled` uses
    torch.compile (needs a C++ compiler).
    """
    stages = prepare(output, stages, effort, resume)
    run = _Run(output, stages, scenes, seed, compiled)
    while run.stage < len(stages):
        while run.step < stages[run.stage].steps:
            run.advance()
            if run.step % report_every == 0 or run.step == stages[run.stage].steps:
                run.report()
        run.next_stage()
    return output / "model"


class _Run:
    """The state of a training run: its model and optimiser, its data and its progress."""

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
        """Run one optimiser step. Its random choices depend only on seed, stage and step."""
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
        """Return the mean squared distance to the encoder's features plus marks, over their variance, at each layer."""
        with torch.no_grad():
            features = [self.tower.pre_layrnorm(self.tower.embeddings(normalised(images)))]
            for layer in self.tower.encoder.layers[:COPIED]:
                features.append(layer(features[-1], None))
        pairs = zip(self.look(images)[1:], features[1:], strict=True)
        return torch.stack([F.mse_loss(a.float(), b.float() + self.places) / b.float().var() for a, b in pairs]).mean()

    def _reading(self, images: Tensor, rows: Any, rng: np.random.Generator) -> Tensor:
        """Return the loss of the answers at [CLS] and at the last word."""
        stage, size = self.stages[self.stage], len(rows)
        variant = rng.integers(0, self.questions.tokens.shape[1], size)
        tokens, last, answers, needed = (
            part[rows, variant]
            for part in (self.questions.tokens, self.questions.last, self.questions.answers, self.questions.needed)
        )
        ease = max(0.0, 1 - self.step / (EASED * stage.steps))
        count = EASY if rng.random() < (0.8 if ease else 0.3) else TOKENS
        objects = torch.from_numpy(self.packs.shown[rows]) != IGNORE
        kept = (torch.from_numpy(rng.random((size, TOKENS))) + 0.9 * objects).topk(count).indices.sort(-1).values
        with torch.no_grad():
            indices = torch.cat([torch.zeros(size, 1, dtype=torch.long), kept + 1], 1).unsqueeze(-1)  # [CLS] is row 0
            states = [state.gather(1, indices.expand(-1, -1, state.shape[-1])) for state in self.look(images)]
        visible = visible_tokens(needed.gather(1, kept), ASKED, ease, rng)
        visible = torch.cat([torch.ones(size, len(ASKED), 1, dtype=torch.bool), visible], 2)
        logits = self.read(states, tokens, visible, last)
        first, word = (F.cross_entropy(part.flatten(0, 1), answers.flatten()) for part in logits)
        return first + word

    def report(self) -> None:
        """Evaluate, save, and append a line to the metrics."""
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
        """Export the model and start the next stage."""
        if self.stages[self.stage].name == "read":
            self._centre()
        export(self.reader.model, self.output / "model")
        self.stage, self.step = self.stage + 1, 0
        if self.stage < len(self.stages):
            self.optimiser = self._new_optimiser()

    def _new_optimiser(self) -> torch.optim.Optimizer:
        """Return AdamW over the parameters that the stage trains; freeze the others."""
        vilt = self.reader.model.vilt
        embeddings, layers = vilt.embeddings, vilt.encoder.layer
        image = (*embeddings.patch_embeddings.parameters(), embeddings.position_embeddings, embeddings.cls_token)
        image_ids = {id(p) for p in (*image, *layers[:COPIED].parameters())}
        trains_image = self.stages[self.stage].name == "look"
        for parameter in self.reader.parameters():
            parameter.requires_grad_((id(parameter) in image_ids) == trains_image)
        trained = [parameter for parameter in self.reader.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.03, fused=True)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Return the accuracy at [CLS] and at the last word by question type, on validation scenes with all patches."""
        hits: dict[str, list[Tensor]] = {}
        questions = self.held_out_questions
        for rows in torch.split(torch.arange(VALIDATION_SCENES), 32):
            images = torch.from_numpy(self.held_out.images[rows.numpy()])
            visible = torch.ones(len(rows), len(ASKED), TOKENS + 1, dtype=torch.bool)
            with torch.autocast("cpu", torch.bfloat16):
                states = self.reader.look(images)
                outputs = self.reader(states, questions.tokens[rows, 0], visible, questions.last[rows, 0])
            for suffix, logits in zip(("", " (word)"), outputs, strict=True):
                right = logits.argmax(-1) == questions.answers[rows, 0]
                for q, slot in enumerate(ASKED):
                    hits.setdefault(SLOTS[slot] + suffix, []).append(right[:, q])
        return {name: torch.cat(parts).float().mean().item() for name, parts in hits.items()}

    @torch.no_grad()
    def _centre(self) -> None:
        """Shift logits to log probabilities on average, from which fine-tuning with one score per answer starts."""
        images, tokens = torch.from_numpy(self.held_out.images[:32]), self.held_out_questions.tokens[:32, 0]
        visible = torch.ones(*tokens.shape[:2], TOKENS + 1, dtype=torch.bool)
        logits, _ = self.reader(self.reader.look(images), tokens, visible, self.held_out_questions.last[:32, 0])
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
    """Save model and processor for `from_pretrained`; weights are stored in bfloat16 and load as float32."""
    weights = {name: value.bfloat16() for name, value in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=weights)
    build_processor().save_pretrained(directory)
