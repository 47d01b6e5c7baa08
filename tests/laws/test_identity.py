"""Law 1: keeping all changes no bit, and detaching leaves no trace."""

import pytest
import torch

import tokensieve
from tests.support import laws_tiny as tiny
from tests.support.methods import specs, whole_specs

SCENARIOS = ("ragged", "two-images", "mixed")


@torch.no_grad()
def outputs(model, family, scenario):
    """Logits of generate, of plain forwards with and without a mask, and with labels."""
    samples = tiny.scenario(family, scenario)
    inputs = tiny.collate(family, samples)
    generated = model.generate(**inputs, max_new_tokens=3, **tiny.GREEDY)
    plain, unmasked = model(**inputs), model(**{k: v for k, v in inputs.items() if k != "attention_mask"})
    labelled = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    return [*generated.logits, generated.sequences, plain.logits, unmasked.logits, labelled.logits, labelled.loss]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keeping_all_changes_no_bit(family, attention, scenario, policy):
    model = tiny.subject(family, attention)
    unhooked = outputs(tiny.pristine(family, attention), family, scenario)
    before = tiny.footprint(model)
    for spec in whole_specs():
        with tokensieve.attach(model, spec, positions=policy) as sieve:
            assert same(outputs(model, family, scenario), unhooked), spec
            assert all(r.whole for row in sieve.last for r in row)
        assert tiny.footprint(model) == before, spec
    assert same(outputs(model, family, scenario), unhooked)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_detach_leaves_no_trace(family):
    model, samples = tiny.subject(family), tiny.scenario(family, "mixed")
    unhooked, before = outputs(tiny.pristine(family), family, "mixed"), tiny.footprint(model)
    config, text = model.config.to_json_string(), model.config.text_config
    for spec in specs(family):
        sieve = tokensieve.attach(model, spec)
        model.generate(**tiny.collate(family, samples), max_new_tokens=2)
        assert model.config.to_json_string() == config
        sieve.detach()
        sieve.detach()  # the second time does nothing
        assert tiny.footprint(model) == before, spec
    assert model.config.text_config is text
    assert same(outputs(model, family, "mixed"), unhooked)


def test_a_reduced_run_really_differs():
    """The law above could not fail if nothing were attached."""
    model, family = tiny.subject("llava-clip"), "llava-clip"
    unhooked = outputs(tiny.pristine(family), family, "two-images")
    with tokensieve.attach(model, "uniform", keep=24):
        assert tiny.footprint(model) != tiny.footprint(tiny.pristine(family))
        assert (outputs(model, family, "two-images")[0] - unhooked[0]).abs().max() > 0.1


def test_an_attached_model_is_collected_when_dropped():
    import gc
    import weakref

    model = tiny.build("llava-clip")
    tokensieve.attach(model, "vtc-cls", keep=5)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
