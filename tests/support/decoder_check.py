"""One run with a method attached, held against the layer loop by hand."""

from functools import cache

import torch

import tokensieve
from tests.methods.decoder.catalogue import COMPOSED, RULES
from tests.support import decoder_by_hand as by_hand
from tests.support import deep_models as models
from tests.support import laws_reference as reference
from tests.support import laws_tiny as tiny
from tests.support.laws_reference import NOISE

STEPS = 4


@cache
def encode(family, scenario):
    """Features of every image of a scenario, `[sample][image]`."""
    model = models.pristine(family)
    samples = tiny.scenario(family, scenario)
    return [[reference.encode(model, family, image) for image in s.images] for s in samples]


@cache
def entering(spec, family, scenario):
    """What the connector method of a spec decides, `[sample][image]`; its own laws are tested elsewhere."""
    samples = tiny.scenario(family, scenario)
    if " + " not in spec:
        return [[tokensieve.Reduction.identity(image.tokens) for image in s.images] for s in samples]
    model = models.subject(family)
    with tokensieve.attach(model, spec.split(" + ")[0]) as sieve, torch.no_grad():
        model(**tiny.collate(family, samples))
    return sieve.last


def by_hand_run(spec, family, scenario, policy, row, answer):
    """Logits `[1 + answer, V]` and final sequence of one sample; only the connector's decision is the engine's."""
    decisions = entering(spec, family, scenario)[row]
    features = zip(encode(family, scenario)[row], decisions, strict=True)
    kept, encoded = [r.kept.tolist() for r in decisions], [e.mixed(r.matrix()) for e, r in features]
    sample, rule = tiny.scenario(family, scenario)[row], (RULES | COMPOSED)[spec]
    return by_hand.run(models.pristine(family), family, sample, rule, kept, encoded, policy, answer)


def generate(family, attention, samples, spec, policy):
    """Greedy steps with the method attached: logits `[row, step, vocabulary]`, tokens, cache, sieve."""
    model = models.subject(family, attention)
    with tokensieve.attach(model, spec, positions=policy) as sieve:
        out = model.generate(**tiny.collate(family, samples), max_new_tokens=STEPS, **tiny.GREEDY)
    return torch.stack(out.logits, 1), out.sequences[:, -STEPS:], out.past_key_values, sieve


def assert_as_by_hand(spec, family, scenario, policy, run, deviation):
    logits, tokens, cache, sieve = run
    samples, entered = tiny.scenario(family, scenario), entering(spec, family, scenario)
    widest = [0] * models.DEPTH
    for i, sample in enumerate(samples):
        answer = tokens[i].tolist()
        by, sequence = by_hand_run(spec, family, scenario, policy, i, answer[:-1])
        assert [r.kept.tolist() for r in sieve.last[i]] == sequence.left, "the tokens that are left"
        assert deviation("from the layer loop by hand (laws 2 and 3)", logits[i], by) <= NOISE
        assert by.argmax(-1).tolist() == answer
        blocks = [[counts[image] for counts in sequence.counts] for image in range(len(sample.images))]
        assert sieve.tokens[i] == blocks
        images = zip(sample.images, sieve.last[i], entered[i], sequence.mixed, strict=True)
        for image, decision, connector, inside in images:
            assert_conserved(decision, image)
            assert torch.allclose(decision.matrix(), inside @ connector.matrix(), atol=1e-6)
        lost = [sum(image.tokens for image in sample.images) - sum(counts) for counts in sequence.counts]
        widest = [max(w, len(sample.ids) - n) for w, n in zip(widest, lost, strict=True)]
    held = [layer.keys.shape[-2] for layer in cache.layers]
    assert held == [w + STEPS - 1 for w in widest], "columns in the KV cache"


def assert_conserved(decision, image):
    """Law 5: original patches to final slots, over all stages."""
    assert decision.total == image.tokens == len(decision.source)
    assert decision.grid == image.grid
    assert bool((decision.anchors.diff() > 0).all())
    assert set(decision.source.tolist()) - {-1} == set(range(decision.slots))
    assert torch.allclose(decision.weight_sums, torch.ones(decision.slots), atol=1e-6)
    assert torch.equal((decision.matrix() != 0).sum(-1), decision.counts)
