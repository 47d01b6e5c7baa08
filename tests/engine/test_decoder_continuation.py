"""Law 4 inside the LLM: beams, several returns, second turns, no cache; each against the layer loop by hand."""

import pytest
import torch

import tokensieve
from tests.methods.decoder.rules import RULES
from tests.methods.decoder.runs import by_hand_run, encode
from tests.support import families, models, oracle, prompts
from tests.support.oracle import NOISE

SPECS = (
    "fastv(layer=2, keep=0.4)",
    "pyramiddrop(keep=0.2)",
    "vtw(layer=3)",
    "sparsevlm(layers=(2, 3), counts=(0.5, 0.25))",
    "sparsevlm-rank(layers=(1, 3), scale=2.0, bias=1.0)",
    "pool-decoder(layer=1, stride=3)",
)
STEPS = 4


def pytest_generate_tests(metafunc):
    for name, values in {"spec": SPECS, "family": families.DEEP, "policy": ("original", "contiguous")}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


def test_beams(spec, family, deviation):
    """The score of every best beam is the one by hand, in a ragged batch."""
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "ragged"))
    with tokensieve.attach(model, spec) as sieve:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, num_beams=3, do_sample=False, return_dict_in_generate=True,
            output_scores=True, length_penalty=0.0,
        )  # fmt: skip
    assert len(sieve.last) == len(sieve.tokens) == 3
    for row, answer in enumerate(out.sequences[:, -STEPS:].tolist()):
        logits, sequence = by_hand_run(spec, family, "ragged", "original", row, answer[:-1])
        score = logits.log_softmax(-1)[range(STEPS), answer].sum()
        assert deviation("of a beam's score from the one by hand (law 4)", out.sequences_scores[row], score) <= NOISE
        assert [r.kept.tolist() for r in sieve.last[row]] == sequence.kept


def test_sampling_with_two_returns(spec, family, deviation):
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "ragged"))
    with tokensieve.attach(model, spec) as sieve:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, num_return_sequences=2, do_sample=True, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    assert len(sieve.last) == 3
    for row, answer in enumerate(out.sequences[:, -STEPS:].tolist()):
        by, _ = by_hand_run(spec, family, "ragged", "original", row // 2, answer[:-1])
        assert deviation("of a sampled return (law 4)", torch.stack(out.logits, 1)[row], by) <= NOISE


@torch.no_grad()
def test_second_turn_on_the_returned_cache(spec, family, policy, deviation):
    """Five new words on the cache of a ragged batch's first turn, in two chunks."""
    samples, model = prompts.batch(family, "ragged"), models.tiny_model(family)
    inputs, words = prompts.collate(family, samples), torch.tensor([[30, 31, 32, 33, 34]] * 3)
    with tokensieve.attach(model, spec, positions=policy):
        out = model.generate(**inputs, max_new_tokens=STEPS, **prompts.GREEDY)
        cache, answers = out.past_key_values, out.sequences[:, -STEPS:]
        following = torch.tensor([oracle.positions(family, s)[1] for s in samples])[:, None]
        new, logits, past = torch.cat([answers[:, -1:], words], 1), [], STEPS - 1
        for chunk in (new[:, :2], new[:, 2:]):
            positions = following + torch.arange(past, past + chunk.shape[1])
            if families.family(family).axes == 3:
                positions = positions.expand(4, -1, -1)
            past += chunk.shape[1]
            mask = torch.cat([inputs["attention_mask"], torch.ones(3, past, dtype=torch.long)], 1)
            step = model(input_ids=chunk, attention_mask=mask, position_ids=positions, past_key_values=cache)
            logits.append(step.logits)
    logits = torch.cat(logits, 1)
    for row in range(3):
        by, _ = by_hand_run(spec, family, "ragged", policy, row, [*answers[row].tolist(), *words[row].tolist()])
        assert deviation("of a second turn (law 4)", logits[row], by[STEPS:]) <= NOISE


def test_generate_continues_on_the_returned_cache(spec, deviation):
    """The same through generate(), with all ids so far and no image again."""
    family = "llava-clip-deep"
    samples, model = prompts.batch(family, "ragged"), models.tiny_model(family)
    inputs, words = prompts.collate(family, samples), torch.tensor([[30, 31, 32, 33, 34]] * 3)
    with tokensieve.attach(model, spec):
        first = model.generate(**inputs, max_new_tokens=STEPS, **prompts.GREEDY)
        ids = torch.cat([first.sequences, words], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, STEPS + 5, dtype=torch.long)], 1)
        turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
        second = model.generate(**turn, max_new_tokens=2, **prompts.GREEDY)
    for row in range(3):
        so_far = [*first.sequences[row, -STEPS:].tolist(), *words[row].tolist(), int(second.sequences[row, -2])]
        by, _ = by_hand_run(spec, family, "ragged", "original", row, so_far)
        assert deviation("of a second turn (law 4)", torch.stack(second.logits, 1)[row], by[-2:]) <= NOISE


def test_without_a_cache(spec, family, policy, deviation):
    """Every step decides again, by the prompt as it has grown."""
    (sample,), model = prompts.batch(family, "single"), models.tiny_model(family)
    with tokensieve.attach(model, spec, positions=policy):
        out = model.generate(**prompts.collate(family, [sample]), max_new_tokens=3, use_cache=False, **prompts.GREEDY)
    answer, every = out.sequences[0, -3:].tolist(), [range(image.tokens) for image in sample.images]
    for step in range(3):
        grown = families.Sample([*sample.ids, *answer[:step]], sample.images)
        unhooked, encoded = models.unhooked(family), encode(family, "single")[0]
        by, _ = oracle.run_inside(unhooked, family, grown, RULES[spec], every, encoded, [], policy)
        assert deviation("without a cache", out.logits[step], by) <= NOISE


@pytest.mark.parametrize("given", ["original"])
def test_a_plain_forward_without_a_mask(spec, family, given, deviation):
    (sample,), model = prompts.batch(family, "single"), models.tiny_model(family)
    inputs = prompts.collate(family, [sample])
    del inputs["attention_mask"]
    with tokensieve.attach(model, spec), torch.no_grad():
        logits = [model(**inputs, use_cache=use_cache).logits[:, -1] for use_cache in (False, True)]
    by, _ = by_hand_run(spec, family, "single", given, 0, [])
    for found in logits:
        assert deviation("of a plain forward", found, by) <= NOISE
