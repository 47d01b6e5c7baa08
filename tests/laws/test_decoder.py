"""Laws 2, 3 and 5 inside the LLM: every method, family, kernel, batch and policy against a layer loop by hand."""

import pytest
import torch

from tests.methods.decoder.catalogue import COMPOSED, RULES
from tests.support import deep_models as models
from tests.support import laws_tiny as tiny
from tests.support.decoder_check import assert_as_by_hand, generate
from tests.support.laws_reference import NOISE


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("scenario", ["ragged", "two-images"])
@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", RULES)
def test_as_by_hand(spec, attention, family, scenario, policy, deviation):
    run = generate(family, attention, tiny.scenario(family, scenario), spec, policy)
    assert_as_by_hand(spec, family, scenario, policy, run, deviation)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("spec", RULES)
def test_rows_without_images(spec, family, deviation):
    """The batch "mixed" holds a long row of text alone: it is as wide as before, whatever leaves the others."""
    run = generate(family, "sdpa", tiny.scenario(family, "mixed"), spec, "original")
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


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("scenario", ["ragged", "two-images"])
@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("spec", COMPOSED)
def test_after_a_connector_method(spec, family, scenario, policy, deviation):
    run = generate(family, "sdpa", tiny.scenario(family, scenario), spec, policy)
    assert_as_by_hand(spec, family, scenario, policy, run, deviation)
