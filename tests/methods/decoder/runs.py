"""Runs with a method inside the LLM, and the same layer by layer by hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

import tokensieve
from tests.methods.decoder.rules import COMPOSED, RULES
from tests.support import models, oracle, prompts
from tests.support.methods import recorded

STEPS = 4


@cache
def encode(family, kind):
    """Features of every image of a batch, `[sample][image]`."""
    return [oracle.encode(models.unhooked(family), family, s) for s in prompts.batch(family, kind)]


@cache
def entering(spec, family, kind):
    """Decisions of the connector method of a spec, `[sample][image]`; its own laws are tested elsewhere."""
    samples = prompts.batch(family, kind)
    if " + " not in spec:
        return [[tokensieve.Reduction.identity(image.tokens) for image in s.images] for s in samples]
    model = models.tiny_model(family)
    with tokensieve.attach(model, spec.split(" + ")[0]) as sieve, torch.no_grad():
        model(**prompts.collate(family, samples))
    return sieve.last


@torch.no_grad()
def by_hand_run(spec, family, kind, policy, row, answer, decide=None):
    """Logits `[1 + answer, V]` and final sequence of one sample; only the connector's decision is the engine's."""
    decisions = entering(spec, family, kind)[row]
    encoded = [e.mixed(r.matrix()) for e, r in zip(encode(family, kind)[row], decisions, strict=True)]
    kept, sample = [r.kept for r in decisions], prompts.batch(family, kind)[row]
    rule = decide or (RULES | COMPOSED)[spec]
    return oracle.run_inside(models.unhooked(family), family, sample, rule, kept, encoded, answer, policy)


def generate(family, attention, samples, spec, policy):
    """Greedy steps with the method attached: logits `[row, step, vocabulary]`, tokens, cache, sieve."""
    model = models.tiny_model(family, attention)
    with tokensieve.attach(model, spec, positions=policy) as sieve:
        out = model.generate(**prompts.collate(family, samples), max_new_tokens=STEPS, **prompts.GREEDY)
    return torch.stack(out.logits, 1), out.sequences[:, -STEPS:], out.past_key_values, sieve


@dataclass(frozen=True)
class Cell:
    """One batch with one method, and each of its samples by hand: by the method's rule, or replaying its decisions."""

    spec: str
    family: str
    attention: str
    kind: str
    policy: str
    replayed: bool = False

    def __str__(self) -> str:
        parts = (self.spec, self.attention, self.family, self.kind, self.policy, "replayed" * self.replayed)
        return "-".join(filter(None, parts))

    @property
    def samples(self) -> list[prompts.Sample]:
        return prompts.batch(self.family, self.kind)

    @cached_property
    def _run(self):
        model = models.tiny_model(self.family, self.attention)
        with recorded(model.model.language_model.layers, self.spec.split(" + ")[-1]) as recording:
            return *generate(self.family, self.attention, self.samples, self.spec, self.policy), recording

    @property
    def logits(self) -> Tensor:
        return self._run[0]

    @property
    def answers(self) -> list[list[int]]:
        return self._run[1].tolist()

    @property
    def held(self) -> list[int]:
        """Columns of each layer's cache."""
        return [layer.keys.shape[-2] for layer in self._run[2].layers]

    @property
    def sieve(self):
        return self._run[3]

    @cached_property
    def by_hand(self) -> list[tuple[Tensor, oracle.Sequence]]:
        """Per sample, logits and the sequence at the end."""
        decide = self._replay if self.replayed else None
        return [
            by_hand_run(self.spec, self.family, self.kind, self.policy, row, answer[:-1], decide)
            for row, answer in enumerate(self.answers)
        ]

    def _replay(self, layer: oracle.Layer, sequence: oracle.Sequence) -> list[oracle.Decision] | None:
        """The method's own decisions, found by the rows that it received."""
        images = [sequence.rows[image] for image in sequence.images]
        normed = layer.decoder.norm  # for methods whose needs name the final norm
        decisions = [self._run[4].decision(layer.number, rows, normed(rows)) for rows in images]
        return None if None in decisions else decisions
