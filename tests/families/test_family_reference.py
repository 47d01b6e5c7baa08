"""The hand reference itself: with every token kept it is the unhooked model, block by block as in one call."""

import pytest
import torch

from tests.support import families, models, oracle, prompts
from tests.support.oracle import noise

STEPS = 6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_reference_of_the_whole_prompt_is_the_unhooked_model(name, attention, deviation):
    model, samples = models.unhooked(name, attention), prompts.batch(name, "one-and-two")
    out = model.generate(**prompts.collate(name, samples), max_new_tokens=STEPS, **prompts.GREEDY)
    got, answers = torch.stack(out.logits, 1), out.sequences[:, -STEPS:].tolist()
    for row, sample in enumerate(samples):
        whole = [range(image.tokens) for image in sample.images]
        encoded = oracle.encode(model, name, sample)
        by_hand = oracle.logits(model, name, sample, whole, encoded, answers[row][:-1])
        assert deviation("of the reference from the unhooked model", got[row], by_hand) <= noise(name)
        if name == "qwen3.5":
            continue  # its linear layers cannot lose tokens in between
        inside = oracle.logits_inside(model, name, sample, {1: whole}, answers[row][:-1])
        assert deviation("of the reference block by block", inside, by_hand) <= noise(name)
