"""Laws 2, 3 and 5 inside the LLM: every method, family, kernel, batch and policy against a layer loop by hand."""

from functools import cache

import pytest
import torch

import tokensieve
from decoder import by_hand, models
from decoder.catalogue import RULES
from laws import reference, tiny
from laws.reference import NOISE

STEPS = 4


@cache
def encode(family, scenario):
    model = models.pristine(family)
    samples = tiny.scenario(family, scenario)
    return [[reference.encode(model, family, image) for image in s.images] for s in samples]


def generate(family, attention, samples, spec, policy):
    """Greedy steps with the method attached: logits `[row, step, vocabulary]`, tokens, cache, sieve."""
    model = models.subject(family, attention)
    with tokensieve.attach(model, spec, positions=policy) as sieve:
        out = model.generate(**tiny.collate(family, samples), max_new_tokens=STEPS, **tiny.GREEDY)
    return torch.stack(out.logits, 1), out.sequences[:, -STEPS:], out.past_key_values, sieve


def assert_as_by_hand(spec, family, scenario, policy, run, deviation):
    logits, tokens, cache, sieve = run
    samples, features = tiny.scenario(family, scenario), encode(family, scenario)
    width, widest = max(len(s.ids) for s in samples), [0] * models.DEPTH
    for i, sample in enumerate(samples):
        answer, every = tokens[i].tolist(), [range(image.tokens) for image in sample.images]
        by, sequence = by_hand.run(
            models.pristine(family), family, sample, RULES[spec], every, features[i], policy, answer[: STEPS - 1]
        )
        assert [r.kept.tolist() for r in sieve.last[i]] == sequence.left, "the tokens that are left"
        assert deviation("from the layer loop by hand (laws 2 and 3)", logits[i], by) <= NOISE
        assert by.argmax(-1).tolist() == answer
        blocks = [[counts[image] for counts in sequence.counts] for image in range(len(sample.images))]
        assert sieve.tokens[i] == blocks
        for image, decision in zip(sample.images, sieve.last[i], strict=True):
            assert_conserved(decision, image, spec)
        lost = [sum(image.tokens for image in sample.images) - sum(counts) for counts in sequence.counts]
        widest = [max(w, width - n) for w, n in zip(widest, lost, strict=True)]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [w + STEPS - 1 for w in widest], (
        "columns in the KV cache"
    )


def assert_conserved(decision, image, spec):
    """Law 5: original patches to final slots, over all stages."""
    assert decision.total == image.tokens == len(decision.source)
    assert decision.grid == image.grid
    assert bool((decision.anchors.diff() > 0).all())
    assert set(decision.source.tolist()) - {-1} == set(range(decision.slots))
    assert torch.allclose(decision.weight_sums, torch.ones(decision.slots), atol=1e-6)
    assert torch.equal((decision.matrix() != 0).sum(-1), decision.counts)


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("scenario", ["ragged", "two-images"])
@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("spec", RULES)
def test_sdpa(spec, family, scenario, policy, deviation):
    run = generate(family, "sdpa", tiny.scenario(family, scenario), spec, policy)
    assert_as_by_hand(spec, family, scenario, policy, run, deviation)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("spec", RULES)
def test_eager_and_rows_without_images(spec, family, deviation):
    """The batch "mixed" holds a long row of text alone: it is as wide as before, whatever leaves the others."""
    run = generate(family, "eager", tiny.scenario(family, "mixed"), spec, "original")
    assert_as_by_hand(spec, family, "mixed", "original", run, deviation)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize(
    "spec", ["fastv(layer=1, keep=13)", "pyramiddrop(keep=0.2)", "pool-decoder(layer=1, stride=3)"]
)
def test_contiguous_positions_in_a_mixed_batch(spec, family, deviation):
    run = generate(family, "eager", tiny.scenario(family, "mixed"), spec, "contiguous")
    assert_as_by_hand(spec, family, "mixed", "contiguous", run, deviation)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("spec", RULES)
def test_a_row_of_a_batch_is_its_own_run(spec, family, deviation):
    samples = tiny.scenario(family, "ragged")
    logits, tokens, _, sieve = generate(family, "sdpa", samples, spec, "original")
    for i, sample in enumerate(samples[:2]):
        own_logits, own_tokens, _, own = generate(family, "sdpa", [sample], spec, "original")
        assert [r.kept.tolist() for r in own.last[0]] == [r.kept.tolist() for r in sieve.last[i]]
        assert deviation("of a batch row from its own run (law 3)", logits[i], own_logits[0]) <= NOISE
        assert torch.equal(own_tokens[0], tokens[i])
