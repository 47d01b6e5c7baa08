"""Law 1: keeping all changes no bit, and detaching leaves no trace."""

import pytest
import torch

import tokensieve
from tests.support import families, models, prompts
from tests.support.methods import FIRST_TUNED, connector_specs, made_specs, whole_specs

each_batch = pytest.mark.parametrize("kind", ["ragged", "two-images", "mixed"])
each_policy = pytest.mark.parametrize("policy", ["original", "contiguous"])
each_kernel = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@torch.no_grad()
def outputs(model, family, kind):
    """Logits of generate, of plain forwards with and without a mask, and with labels."""
    samples = prompts.batch(family, kind)
    inputs = prompts.collate(family, samples)
    generated = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
    plain, unmasked = model(**inputs), model(**{k: v for k, v in inputs.items() if k != "attention_mask"})
    labelled = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    return [*generated.logits, generated.sequences, plain.logits, unmasked.logits, labelled.logits, labelled.loss]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_policy
@each_batch
@each_kernel
@pytest.mark.parametrize("family", families.CORE)
def test_keeping_all_changes_no_bit(family, attention, kind, policy):
    model = models.tiny_model(family, attention)
    unhooked = outputs(models.unhooked(family, attention), family, kind)
    before = models.footprint(model)
    for spec in (*whole_specs(), *made_specs(family, 1.0)):
        with tokensieve.attach(model, spec, positions=policy) as sieve:
            assert same(outputs(model, family, kind), unhooked), spec
            assert all(r.whole for row in sieve.last for r in row)
        assert models.footprint(model) == before, spec
    assert same(outputs(model, family, kind), unhooked)


@pytest.mark.parametrize("family", families.CORE)
def test_detach_leaves_no_trace(family):
    model, samples = models.tiny_model(family), prompts.batch(family, "mixed")
    unhooked, before = outputs(models.unhooked(family), family, "mixed"), models.footprint(model)
    config, text = model.config.to_json_string(), model.config.text_config
    for spec in (*connector_specs(family), *made_specs(family)):
        sieve = tokensieve.attach(model, spec)
        model.generate(**prompts.collate(family, samples), max_new_tokens=2)
        assert model.config.to_json_string() == config
        sieve.detach()
        sieve.detach()  # the second time does nothing
        assert models.footprint(model) == before, spec
    assert model.config.text_config is text
    assert same(outputs(model, family, "mixed"), unhooked)


@each_policy
@each_kernel
@pytest.mark.parametrize("family", families.CORE)
@torch.no_grad()
def test_keeping_all_changes_no_bit_with_tuned_methods(family, attention, policy):
    model, inputs = models.tiny_model(family, attention), prompts.collate(family, prompts.batch(family, "mixed"))
    unhooked = model(**inputs).logits
    for spec in FIRST_TUNED.values():
        if "keep" in tokensieve.parse(spec)[0].info.parameters:
            with tokensieve.attach(model, spec.split("(")[0], keep=1.0, positions=policy) as sieve:
                assert torch.equal(model(**inputs).logits, unhooked), spec
            assert all(r.whole for row in sieve.last for r in row)
    assert torch.equal(model(**inputs).logits, unhooked)


@each_policy
@each_kernel
@pytest.mark.parametrize("family", families.CORE)
@torch.no_grad()
def test_detach_leaves_no_trace_of_tuned_methods(family, attention, policy):
    model, inputs = models.tiny_model(family, attention), prompts.collate(family, prompts.batch(family, "mixed"))
    unhooked, before = model(**inputs).logits, models.footprint(model)
    for spec in FIRST_TUNED.values():
        with tokensieve.attach(model, spec, positions=policy):
            assert model(**inputs).logits.shape[1] < unhooked.shape[1]
        assert models.footprint(model) == before, spec
    assert torch.equal(model(**inputs).logits, unhooked)


def test_a_reduced_run_really_differs():
    """The law above could not fail if nothing were attached."""
    model, family = models.tiny_model("llava-clip"), "llava-clip"
    unhooked = outputs(models.unhooked(family), family, "two-images")
    with tokensieve.attach(model, "uniform", keep=24):
        assert models.footprint(model) != models.footprint(models.unhooked(family))
        assert (outputs(model, family, "two-images")[0] - unhooked[0]).abs().max() > 0.1


def test_an_attached_model_is_collected_when_dropped():
    import gc
    import weakref

    model = models.build("llava-clip")
    tokensieve.attach(model, "vtc-cls", keep=5)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
