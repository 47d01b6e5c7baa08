"""Laws 2, 3 and 5 in one matrix: every method, family, kernel, batch and position policy.

One cell generates a batch, then asks of every row: did the decision conserve the tokens (law 5), are prefill and eight
greedy steps those of the hand reference (law 2), and are they those of the row's own batch-1 run (law 3)? Batch 1 is in
it twice: as those runs, and as "two-images".
"""

from functools import cache

import pytest
import torch

import tokensieve
from tests.support import laws_reference as reference
from tests.support import laws_tiny as tiny
from tests.support.laws_reference import NOISE
from tests.support.methods import specs

STEPS = 8
SCENARIOS = ("ragged", "two-images", "mixed")


@cache
def encode(family: str, attention: str, scenario: str, cells: tuple):
    """Features of every image of a scenario, `[sample][image]`, resized to its ``cells`` if they are given."""
    model, samples = tiny.pristine(family, attention), tiny.scenario(family, scenario)
    return [
        [reference.encode(model, family, image, cell) for image, cell in zip(s.images, row, strict=True)]
        for s, row in zip(samples, cells, strict=True)
    ]


def rows_by_hand(family, attention, scenario, spec, decisions):
    """The rows that should stand in the sequence, `[sample][image]`: W · features, W densely from the decision."""
    samples, (first, *_) = tiny.scenario(family, scenario), tokensieve.parse(spec)
    cells = tuple(tuple(resized(first, image) for image in s.images) for s in samples)
    features = encode(family, attention, scenario, cells)

    def matrix(image, cell, decision):
        if cell is None:
            return decision.matrix()
        # the tower saw the small image: of W = W_second · W_resize only W_second acts on its features
        resize = reference.area_matrix(image.grid, cell).double()
        return (decision.matrix().double() @ torch.linalg.pinv(resize)).float()

    return [
        [e.mixed(matrix(*image)) for e, image in zip(found, zip(s.images, cell, row, strict=True), strict=True)]
        for found, s, cell, row in zip(features, samples, cells, decisions, strict=True)
    ]


def resized(method, image):
    """(height, width) in tokens at which the tower sees the image; ``None``: as it is."""
    if method.info.name != "downsample":
        return None
    budget = method.keep if isinstance(method.keep, int) else max(1, round(method.keep * image.tokens))
    return reference.largest_grid(image.grid, budget) if budget < image.tokens else None


def run(model, family, samples, spec, policy):
    """Greedy steps with the method attached: logits `[row, step, vocabulary]`, tokens, decisions, KV lengths."""
    with tokensieve.attach(model, spec, positions=policy) as sieve:
        out = model.generate(**tiny.collate(family, samples), max_new_tokens=STEPS, **tiny.GREEDY)
        held = {layer.keys.shape[-2] for layer in out.past_key_values.layers}
        return torch.stack(out.logits, 1), out.sequences[:, -STEPS:], sieve.last, held


@cache
def alone(family, attention, scenario, row, spec, policy):
    """The batch-1 run of one sample."""
    return run(tiny.subject(family, attention), family, [tiny.scenario(family, scenario)[row]], spec, policy)


def assert_conserved(decision, image, spec):
    """Law 5 for one image."""
    source, anchors = decision.source, decision.anchors
    assert decision.total == image.tokens == len(source)
    assert bool((anchors.diff() > 0).all())
    assert int(anchors[0]) >= 0
    assert int(anchors[-1]) < image.tokens
    assert set(source.tolist()) - {-1} == set(range(decision.slots)), "a slot that no token is listed under"
    assert torch.allclose(decision.weight_sums, torch.ones(decision.slots), atol=1e-6)
    assert torch.equal((decision.matrix() != 0).sum(-1), decision.counts)
    if decision.mixing is None:
        assert torch.equal(source[anchors], torch.arange(decision.slots))
        assert int((source >= 0).sum()) == decision.slots
    budgets = [m.keep for m in tokensieve.parse(spec) if hasattr(m, "keep")]
    asked = image.tokens
    for keep in budgets:  # every stage leaves at most its budget of what it is given
        asked = min(asked, keep if isinstance(keep, int) else max(1, round(keep * asked)))
    assert decision.slots <= asked
    if budgets and "pool" not in spec and "downsample" not in spec:
        assert decision.slots == asked
    if decision.whole and budgets:
        assert any("kept whole" in note for note in decision.notes)


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "spec"), [(family, spec) for family in tiny.FAMILIES for spec in specs(family)])
def test_oracle_batch_and_conservation(spec, family, attention, scenario, policy, deviation):
    samples = tiny.scenario(family, scenario)
    logits, tokens, decisions, held = run(tiny.subject(family, attention), family, samples, spec, policy)

    assert [len(row) for row in decisions] == [len(s.images) for s in samples]
    for s, row in zip(samples, decisions, strict=True):
        for image, decision in zip(s.images, row, strict=True):
            assert_conserved(decision, image, spec)
    lengths = [len(reference.columns(s, [r.kept for r in row])) for s, row in zip(samples, decisions, strict=True)]
    assert held == {max(lengths) + STEPS - 1}, "columns held in the KV cache: the padding that all rows share is gone"

    rows = rows_by_hand(family, attention, scenario, spec, decisions)
    for i, s in enumerate(samples):
        kept, answer = [r.kept for r in decisions[i]], tokens[i].tolist()
        by_hand = reference.logits(
            tiny.pristine(family, attention), family, s, kept, rows[i], policy, answer[: STEPS - 1]
        )
        assert deviation("from the hand reference (law 2)", logits[i], by_hand) <= NOISE
        assert by_hand.argmax(-1).tolist() == answer
        if len(samples) == 1 or not s.images:
            continue
        own_logits, own_tokens, own_decisions, _ = alone(family, attention, scenario, i, spec, policy)
        assert [r.kept.tolist() for r in own_decisions[0]] == [k.tolist() for k in kept]
        assert deviation("of a batch row from its own run (law 3)", logits[i], own_logits[0]) <= NOISE
        assert own_tokens[0].tolist() == answer
