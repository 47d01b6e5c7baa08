"""Law 1 inside the LLM: keeping all changes no bit, detaching leaves no trace, and others may call the LLM."""

import pytest
import torch

import tokensieve
from tests.methods.decoder.rules import RULES, WHOLE
from tests.support import families, models, prompts


@torch.no_grad()
def outputs(model, family):
    inputs = prompts.collate(family, prompts.batch(family, "mixed"))
    generated = model.generate(**inputs, max_new_tokens=2, **prompts.GREEDY)
    plain = model(**inputs)
    return [*generated.logits, generated.sequences, plain.logits]


def traces(model):
    """All that attaching could leave behind: attributes and hooks of every module, and its config."""
    return [
        (
            name,
            sorted(vars(part)),
            len(part._forward_pre_hooks),
            len(part._forward_hooks),
            id(getattr(part, "config", 0)),
        )
        for name, part in model.named_modules()
    ]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", families.DEEP)
def test_keeping_all_changes_no_bit(family, attention, policy):
    model = models.tiny_model(family, attention)
    unhooked = outputs(models.unhooked(family, attention), family)
    assert same(outputs(model, family), unhooked)  # transformers installs hooks of its own in the first call
    before = traces(model)
    for spec in WHOLE:
        with tokensieve.attach(model, spec, positions=policy) as sieve:
            assert same(outputs(model, family), unhooked), spec
        assert all(r.slots == r.total for row in sieve.last for r in row)
        assert traces(model) == before, spec


@pytest.mark.parametrize("family", families.DEEP)
def test_detach_leaves_no_trace(family):
    model = models.tiny_model(family)
    unhooked, before = outputs(model, family), traces(model)
    for spec in RULES:
        with tokensieve.attach(model, spec):
            assert not same(outputs(model, family), unhooked), spec
        assert traces(model) == before, spec
    assert same(outputs(model, family), unhooked)


@pytest.mark.parametrize("family", families.DEEP)
def test_a_prompt_without_images_and_a_direct_call_of_the_llm(family):
    model, unhooked = models.tiny_model(family), models.unhooked(family)
    ids = torch.tensor([[families.BOS, 20, 21, 22]])
    embeds = model.get_input_embeddings()(ids)
    with tokensieve.attach(model, "pyramiddrop(keep=0.2)") as sieve, torch.no_grad():
        model.generate(**prompts.collate(family, prompts.batch(family, "single")), max_new_tokens=1)
        assert sieve.last[0]
        assert torch.equal(model(input_ids=ids).logits, unhooked(input_ids=ids).logits)
        assert sieve.last == []
        direct = model.model.language_model(inputs_embeds=embeds).last_hidden_state
        assert torch.equal(direct, unhooked.model.language_model(inputs_embeds=embeds).last_hidden_state)
