"""Connector methods that merge, or keep what they find: several images, beams, replays, other stages, refusals."""

from dataclasses import replace

import pytest
import torch

import tokensieve
from tests.support import families, models, oracle, prompts
from tests.support.oracle import NOISE
from tokensieve import Reduction

STEPS = 3


def run(family, samples, method):
    with tokensieve.attach(models.tiny_model(family), method) as sieve:
        out = sieve.model.generate(**prompts.collate(family, samples), max_new_tokens=STEPS, **prompts.GREEDY)
        return torch.stack(out.logits, 1), out.sequences[:, -STEPS:], sieve.last


@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl"])
@pytest.mark.parametrize("spec", ["prumerge", "visionzip(keep=9)", "setok-cluster(threshold=0.9)"])
def test_several_images_beams_and_replay(spec, family):
    samples = prompts.batch(family, "mixed")
    logits, tokens, decisions = run(family, samples, spec)
    for i, s in enumerate(samples):
        kept, answer = [r.kept for r in decisions[i]], tokens[i].tolist()
        rows = [oracle.reduced(family, "sdpa", *pair) for pair in zip(s.images, decisions[i], strict=True)]
        hand = oracle.logits(models.unhooked(family), family, s, kept, rows, answer[:-1])
        assert (logits[i] - hand).abs().max() <= NOISE
    again = [[Reduction.from_json(r.to_json()) for r in row] for row in decisions]
    assert torch.equal(run(family, samples, again)[0], logits)

    model, one = models.tiny_model(family), [samples[0]]
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": STEPS}
    with tokensieve.attach(model, spec):
        together = model.generate(**prompts.collate(family, samples), **beams)[0, -STEPS:]
        alone = model.generate(**prompts.collate(family, one), **beams)[0, -STEPS:]
    assert together.tolist() == alone.tolist()


def test_adaptive_methods_keep_different_numbers_in_one_batch():
    family = "llava-clip"
    samples = prompts.batch(family, "ragged")
    for spec in ("prumerge", "prumerge+"):
        *_, decisions = run(family, samples, spec)
        assert len({row[0].slots for row in decisions}) > 1, spec


@pytest.mark.parametrize("family", families.CORE)
@pytest.mark.parametrize("first", ["downsample(keep=0.6)"])
def test_after_a_smaller_image(family, first):
    """The tower saw a smaller image: evidence and merges are about its tokens."""
    samples = prompts.batch(family, "ragged")
    for spec in ("visionzip(keep=4)", "prumerge(keep=4)", "scope(keep=4)", "mmtok(keep=4)", "fopru(keep=4)"):
        logits, _, decisions = run(family, samples, f"{first} + {spec}")
        assert all(r.slots == 4 for row in decisions for r in row)
        own, _, own_decisions = run(family, samples[:1], f"{first} + {spec}")
        assert own_decisions[0][0].kept.tolist() == decisions[0][0].kept.tolist()
        assert (own[0] - logits[0]).abs().max() <= NOISE


@pytest.mark.parametrize("family", families.CORE)
@pytest.mark.parametrize("first", ["visionzip(keep=9)", "prumerge+", "par(keep=9, threshold=0.3)"])
def test_before_a_decoder_stage(family, first):
    samples, spec = prompts.batch(family, "ragged"), f"{first} + fastv(layer=1, keep=3)"
    logits, _, decisions = run(family, samples, spec)
    for i, s in enumerate(samples):
        own, _, own_decisions = run(family, [s], spec)
        assert decisions[i][0].slots <= 3
        assert own_decisions[0][0].kept.tolist() == decisions[i][0].kept.tolist()
        assert (own[0] - logits[i]).abs().max() <= NOISE


@pytest.mark.parametrize("family", families.CORE)
def test_refusals(family):
    model = models.tiny_model(family)
    before = models.footprint(model)
    for spec, reason in (
        ("cdpruner(space='joint')", "no parameter 'space'"),
        ("prumerge+(keep=4, top=3)", "either keep, or top"),
        ("visionzip(contextual=1.0)", "share"),
        ("visionzip(combine='sum')", "combine must be"),
        ("visionzip(keep=None)", "keep must be"),
        ("vispruner(step=0)", "step"),
        ("par(route=0)", "route"),
    ):
        with pytest.raises(ValueError, match=reason):
            tokensieve.attach(model, spec)
    assert models.footprint(model) == before


def test_cdpruner_notes_that_the_joint_space_is_missing():
    family = "llava-clip"
    *_, decisions = run(family, prompts.batch(family, "single"), "cdpruner(keep=5)")
    assert any("no CLIP text encoder" in note for note in decisions[0][0].notes)


def test_notes_and_projection_survive_composition():
    first = Reduction.identity(6)
    second = replace(Reduction(6, torch.tensor([0, 3])), projected=False, notes=("a",))
    assert second.after(first).projected is False
    third = Reduction(2, torch.tensor([1]))
    assert third.after(second).projected is False
    assert third.after(second).notes == ("a",)
