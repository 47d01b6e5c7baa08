"""The laws inside the vision tower: every method, CLIP and SigLIP, kernels and batches, against a tower run by hand."""

from functools import cache

import pytest
import torch

import tokensieve
from tests.methods.encoder.catalogue import ADAPTIVE, FAMILIES, RULES
from tests.support import encoder_oracle as by_hand
from tests.support import laws_reference as reference
from tests.support import laws_tiny as tiny
from tests.support.laws_reference import NOISE

STEPS = 3
FEATURES = 3  # state 3 of 0 … 4: what -2 means
each_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def images_by_hand(family, spec, scenario):
    """Per sample and image: rows for the LLM, their places, and W."""
    model = tiny.pristine(family)
    with torch.no_grad():
        return [
            [
                by_hand.encoded(model, by_hand.run(model.model.vision_tower, i.pixels, RULES[spec]), FEATURES)
                for i in s.images
            ]
            for s in tiny.scenario(family, scenario)
        ]


def generate(family, samples, spec, attention="sdpa", policy="original", **more):
    model = tiny.subject(family, attention)
    with tokensieve.attach(model, spec, positions=policy) as sieve:
        out = model.generate(**tiny.collate(family, samples), max_new_tokens=STEPS, **{**tiny.GREEDY, **more})
        return torch.stack(out.logits, 1), out.sequences[:, -STEPS:], sieve.last, sieve.tokens


@cache
def alone(family, spec, scenario, row, attention, policy):
    return generate(family, [tiny.scenario(family, scenario)[row]], spec, attention, policy)


@pytest.mark.parametrize(
    ("scenario", "policy"), [("ragged", "original"), ("two-images", "original"), ("mixed", "contiguous")]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@each_family
@pytest.mark.parametrize("spec", RULES)
def test_oracle_batch_and_conservation(spec, family, attention, scenario, policy, deviation):
    samples, expected = tiny.scenario(family, scenario), images_by_hand(family, spec, scenario)
    logits, tokens, decisions, counts = generate(family, samples, spec, attention, policy)
    for i, s in enumerate(samples):
        for (_, places, mixed), decision in zip(expected[i], decisions[i], strict=True):
            assert decision.total == mixed.shape[1] == len(decision.source)
            assert decision.kept.tolist() == places
            assert decision.grid == (tiny.SIDE, tiny.SIDE)
            assert deviation("from W by hand (law 5)", decision.matrix(), mixed) <= 1e-5
            assert torch.equal((mixed != 0).sum(-1), decision.counts)
            assert torch.allclose(decision.weight_sums, torch.ones(len(places)), atol=1e-5)
            assert decision.whole == (len(places) == decision.total)
        assert counts[i] == [[len(places)] * 3 for _, places, _ in expected[i]]
        kept, rows = [places for _, places, _ in expected[i]], [rows for rows, _, _ in expected[i]]
        answer = tokens[i].tolist()
        hand = reference.logits(tiny.pristine(family, attention), family, s, kept, rows, policy, answer[: STEPS - 1])
        assert deviation("from the hand reference (law 2)", logits[i], hand) <= NOISE
        assert hand.argmax(-1).tolist() == answer
        if len(samples) > 1 and s.images:
            own_logits, own_tokens, own, _ = alone(family, spec, scenario, i, attention, policy)
            assert [r.kept.tolist() for r in own[0]] == kept
            assert deviation("of a batch row from its own run (law 3)", logits[i], own_logits[0]) <= NOISE
            assert own_tokens[0].tolist() == answer


@each_family
def test_images_of_one_batch_may_keep_different_numbers(family):
    """Padding inside the tower: the laws above would be easy without it."""
    *_, decisions, _ = generate(family, tiny.scenario(family, "mixed"), ADAPTIVE[family])
    assert len({r.slots for row in decisions for r in row}) > 1


@each_family
def test_rules_merge_what_the_paper_says_not_what_lies_nearby(family):
    """The by-hand rules are no tautology: other parameters give other decisions."""
    found = [
        [(places, mixed.tolist()) for row in images_by_hand(family, spec, "mixed") for _, places, mixed in row]
        for spec in RULES
    ]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


# -- law 1 ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model, family, scenario):
    inputs = tiny.collate(family, tiny.scenario(family, scenario))
    out = model.generate(**inputs, max_new_tokens=2, **tiny.GREEDY)
    plain = model(**inputs, labels=inputs["input_ids"])
    tower = model.model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
    return [*out.logits, plain.logits, plain.loss, tower.last_hidden_state, *tower.hidden_states]


@pytest.mark.parametrize("scenario", ["ragged", "two-images"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@each_family
def test_keeping_all_changes_no_bit_and_detaching_leaves_no_trace(family, attention, scenario):
    model = tiny.subject(family, attention)
    outputs(model, family, scenario)  # transformers' own lazy hooks
    unhooked, before = outputs(tiny.pristine(family, attention), family, scenario), tiny.footprint(model)
    for spec in ("tome(keep=1.0)", "tome(r=0)", "illava-encoder(keep=25)", "mustdrop-encoder(threshold=1.1)"):
        with tokensieve.attach(model, spec) as sieve:
            got = outputs(model, family, scenario)
            assert all(torch.equal(a, b) for a, b in zip(got, unhooked, strict=True)), spec
            model.generate(**tiny.collate(family, tiny.scenario(family, scenario)), max_new_tokens=1)
            assert all(r.whole and r.mixing is None for row in sieve.last for r in row)
            if "threshold" not in spec:
                assert all("kept whole" in note for row in sieve.last for r in row for (note,) in [r.notes])
        assert tiny.footprint(model) == before
    for spec in ("tome(keep=5)", "illava-encoder(keep=0.4)", "mustdrop-encoder(threshold=-1.0)"):
        with tokensieve.attach(model, spec):
            reduced = outputs(model, family, scenario)
            assert not torch.equal(reduced[0], unhooked[0])
        assert tiny.footprint(model) == before
    got = outputs(model, family, scenario)
    assert all(torch.equal(a, b) for a, b in zip(got, unhooked, strict=True))


# -- law 4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["tome(keep=5)", "adaptive"])
@each_family
def test_beams_turns_and_plain_forwards(family, spec, deviation):
    spec = ADAPTIVE[family] if spec == "adaptive" else spec
    model, samples = tiny.subject(family), tiny.scenario(family, "mixed")
    inputs = tiny.collate(family, samples)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    with tokensieve.attach(model, spec) as sieve, torch.no_grad():
        together = model.generate(**inputs, **beams)[:, -4:]
        decided = [[r.kept.tolist() for r in row] for row in sieve.last]
        greedy = model.generate(**inputs, max_new_tokens=3, **tiny.GREEDY)
        plain = model(**inputs)
        assert deviation("of a plain forward", plain.logits[:, -1], greedy.logits[0]) <= NOISE
        assert [[r.kept.tolist() for r in row] for row in sieve.last] == decided
        ids = torch.cat([greedy.sequences, torch.arange(11, 15).expand(len(samples), -1)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(samples), 7, dtype=torch.long)], 1)
        turn = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 3, **tiny.GREEDY}
        second = model.generate(**turn, past_key_values=greedy.past_key_values)
        again = model.generate(**turn, pixel_values=inputs["pixel_values"])
        assert deviation("of a second turn (law 4)", torch.stack(second.logits), torch.stack(again.logits)) <= NOISE
        for i, s in enumerate(samples):
            if s.images:
                own = model.generate(**tiny.collate(family, [s]), **beams)[:, -4:]
                assert together[2 * i : 2 * i + 2].tolist() == own.tolist()


@each_family
def test_a_replay_averages_what_the_whole_tower_puts_out(family):
    """What the documentation says of it: W of the decision, on the rows of the unreduced tower."""
    samples = tiny.scenario(family, "ragged")
    *_, decisions, _ = generate(family, samples, "tome(keep=9)")
    seen, model = [], tiny.subject(family)
    with tokensieve.attach(model, decisions):
        hook = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["mm_encoder_outputs"]["image"].pooler_output),
            with_kwargs=True,
        )
        model.generate(**tiny.collate(family, samples), max_new_tokens=1)
        hook.remove()
    images = [image for s in samples for image in s.images]
    with torch.no_grad():
        pixels = torch.stack([image.pixels for image in images])
        whole = tiny.pristine(family).model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    flat = [decision for row in decisions for decision in row]
    expected = torch.cat([decision.matrix() @ rows for decision, rows in zip(flat, whole, strict=True)])
    torch.testing.assert_close(torch.cat([*seen[0]]).view_as(expected), expected, atol=1e-5, rtol=1e-5)
