"""Runs with a method inside the LLM, and the same layer by layer by hand."""

from __future__ import annotations

from functools import cache

import torch

import tokensieve
from tests.methods.decoder.rules import COMPOSED, RULES
from tests.support import models, oracle, prompts

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
    compact = tokensieve.parse(spec)[-1].leaves_caches
    return oracle.run_inside(models.unhooked(family), family, sample, rule, kept, encoded, answer, policy, compact)


def generate(family, attention, samples, spec, policy):
    """Greedy steps with the method attached: logits `[row, step, vocabulary]`, tokens, cache, sieve."""
    model = models.tiny_model(family, attention)
    with tokensieve.attach(model, spec, positions=policy) as sieve:
        out = model.generate(**prompts.collate(family, samples), max_new_tokens=STEPS, **prompts.GREEDY)
    return torch.stack(out.logits, 1), out.sequences[:, -STEPS:], out.past_key_values, sieve
