"""The laws inside the vision encoder: every method, CLIP and SigLIP, kernels and batches, against one run by hand.

Methods that are restated in ``tests/methods/encoder/rules.py`` decide by these rules in the encoder by hand. Of every
method in the registry the recorded decisions are replayed there as well.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product

import pytest
import torch

import tokensieve
from tests.laws.cell import Cell
from tests.methods.encoder.rules import ADAPTIVE, FAMILIES, RULES
from tests.support import encoder_oracle, families, models, oracle, prompts
from tests.support.encoder_oracle import Rule
from tests.support.methods import inside_specs, recorded
from tests.support.oracle import NOISE
from tokensieve.methods import EncoderMethod

STEPS = 3
FEATURES = 3  # state 3 of 0 … 4: what -2 means
each_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def images_by_hand(family, rule, kind):
    """Per sample and image: rows for the LLM, their places, and W."""
    model = models.unhooked(family)
    run = encoder_oracle.run
    return [
        [encoder_oracle.encoded(model, run(model.model.vision_tower, i.pixels, rule), FEATURES) for i in s.images]
        for s in prompts.batch(family, kind)
    ]


ruled = cache(lambda family, spec, kind: images_by_hand(family, RULES[spec], kind))


def generate(family, samples, spec, attention="sdpa", policy="original", **more):
    model = models.tiny_model(family, attention)
    with tokensieve.attach(model, spec, positions=policy) as sieve:
        out = model.generate(**prompts.collate(family, samples), max_new_tokens=STEPS, **{**prompts.GREEDY, **more})
        return torch.stack(out.logits, 1), out.sequences[:, -STEPS:].tolist(), sieve.last, sieve.tokens


@dataclass(frozen=True)
class EncoderCell(Cell):
    """Greedy steps with a method inside the vision encoder, and its images by hand."""

    @cached_property
    def _recorded(self):
        layers = models.tiny_model(self.family, self.attention).model.vision_tower.encoder.layers
        with recorded(layers, self.spec) as recording:
            run = generate(self.family, self.samples, self.spec, self.attention, self.policy)
        return run, recording

    @property
    def run(self):
        return self._recorded[0]

    @cached_property
    def by_hand(self):
        """Per sample and image: rows for the LLM, their places, and W."""
        if not self.replayed:
            return ruled(self.family, self.spec, self.kind)
        (method,), recording = tokensieve.parse(self.spec), self._recorded[1]

        def groups(stage, rows, x):
            decision = recording.decision(len(rows.attention) - 1, x[rows.specials :])
            if decision is None:
                return [(i, [(i, 1.0)]) for i in range(len(rows.places))]
            matrix, anchors = decision
            members = [[(int(j), float(row[j])) for j in row.nonzero()] for row in matrix]
            return list(zip(anchors, members, strict=True))

        rule = Rule(groups, [0, 1, 2], behind=method.after_layer, proportional=method.proportional)
        return images_by_hand(self.family, rule, self.kind)


@cache
def row_run(family, spec, kind, row, attention, policy):
    return generate(family, [prompts.batch(family, kind)[row]], spec, attention, policy)


WAYS = [("ragged", "original"), ("mixed", "contiguous"), ("two-images", "original")]


def replayed_cells() -> list[EncoderCell]:
    """Every registered method: one cell for each family, and all of them where no rule by hand exists."""
    ruled_names = {spec.split("(")[0] for spec in RULES}
    ways = [(attention, *way) for attention, way in product(("sdpa", "eager"), WAYS)]
    return [
        EncoderCell(spec, family, *way, replayed=True)
        for spec, family in product(inside_specs("encoder"), FAMILIES)
        for way in (ways[1:2] if spec.split("(")[0] in ruled_names else ways)
    ]


CELLS = [
    EncoderCell(spec, family, attention, *way)
    for way, spec, family, attention in product(WAYS, RULES, FAMILIES, ("sdpa", "eager"))
]
BATCHES = [cell for cell in CELLS if cell.kind != "two-images"]  # they come first, so that tests share the runs


@pytest.fixture(scope="module", params=[*CELLS, *replayed_cells()], ids=str)
def cell(request):
    return replace(request.param)  # its cached run goes with it


def test_oracle(cell, deviation):
    """Law 2."""
    logits, answers, _, _ = cell.run
    model = models.unhooked(cell.family, cell.attention)
    for i, (s, answer) in enumerate(zip(cell.samples, answers, strict=True)):
        kept, rows = [places for _, places, _ in cell.by_hand[i]], [rows for rows, _, _ in cell.by_hand[i]]
        hand = oracle.logits(model, cell.family, s, kept, rows, answer[:-1], cell.policy)
        assert deviation("from the hand reference (law 2)", logits[i], hand) <= NOISE
        assert hand.argmax(-1).tolist() == answer


@pytest.mark.parametrize("cell", BATCHES, ids=str, indirect=True, scope="module")
def test_each_row_is_its_own_run(cell, deviation):
    """Law 3."""
    logits, answers, decisions, _ = cell.run
    for i in (i for i, s in enumerate(cell.samples) if s.images):
        own = row_run(cell.family, cell.spec, cell.kind, i, cell.attention, cell.policy)
        assert [r.kept.tolist() for r in own[2][0]] == [r.kept.tolist() for r in decisions[i]]
        assert deviation("of a batch row from its own run (law 3)", logits[i], own[0][0]) <= NOISE
        assert own[1][0] == answers[i]


def test_conservation(cell, deviation):
    """Law 5: the tokens that are left, and what each is made of, are those by hand."""
    for by_hand, decisions in zip(cell.by_hand, cell.run[2], strict=True):
        for (_, places, mixed), decision in zip(by_hand, decisions, strict=True):
            assert decision.total == mixed.shape[1] == len(decision.source)
            assert decision.kept.tolist() == places
            assert decision.grid == (families.SIDE, families.SIDE)
            assert deviation("from W by hand (law 5)", decision.matrix(), mixed) <= 1e-5
            assert torch.equal((mixed != 0).sum(-1), decision.counts)
            assert torch.allclose(decision.weight_sums, torch.ones(len(places)), atol=1e-5)
            assert decision.whole == (len(places) == decision.total)


def test_tokens_of_each_llm_layer(cell):
    """Law 6."""
    for by_hand, counts in zip(cell.by_hand, cell.run[3], strict=True):
        assert counts == [[len(places)] * 3 for _, places, _ in by_hand]


@each_family
def test_images_of_one_batch_may_keep_different_numbers(family):
    """Padding inside the tower: the laws above would be easy without it."""
    *_, decisions, _ = generate(family, prompts.batch(family, "mixed"), ADAPTIVE[family])
    assert len({r.slots for row in decisions for r in row}) > 1


@each_family
def test_rules_with_other_parameters_decide_otherwise(family):
    """The by-hand rules are no tautology: other parameters give other decisions."""
    found = [
        [(places, mixed.tolist()) for row in ruled(family, spec, "mixed") for _, places, mixed in row] for spec in RULES
    ]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


# -- law 1 ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model, family, kind):
    inputs = prompts.collate(family, prompts.batch(family, kind))
    out = model.generate(**inputs, max_new_tokens=2, **prompts.GREEDY)
    plain = model(**inputs, labels=inputs["input_ids"])
    tower = model.model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
    return [*out.logits, plain.logits, plain.loss, tower.last_hidden_state, *tower.hidden_states]


@pytest.mark.parametrize("kind", ["ragged", "two-images"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@each_family
def test_keeping_all_changes_no_bit_and_detaching_leaves_no_trace(family, attention, kind):
    model = models.tiny_model(family, attention)
    outputs(model, family, kind)  # transformers' own lazy hooks
    unhooked, before = outputs(models.unhooked(family, attention), family, kind), models.footprint(model)
    for spec in (
        "tome(keep=1.0)",
        "tome(r=0)",
        "illava-encoder(keep=25)",
        "flowcut(keep=1.0)",
        "mustdrop-encoder(threshold=1.1)",
    ):
        with tokensieve.attach(model, spec) as sieve:
            got = outputs(model, family, kind)
            assert all(torch.equal(a, b) for a, b in zip(got, unhooked, strict=True)), spec
            model.generate(**prompts.collate(family, prompts.batch(family, kind)), max_new_tokens=1)
            assert all(r.whole and r.mixing is None for row in sieve.last for r in row)
            if "threshold" not in spec:
                assert all("kept whole" in note for row in sieve.last for r in row for (note,) in [r.notes])
        assert models.footprint(model) == before
    for spec in ("tome(keep=5)", "illava-encoder(keep=0.4)", "mustdrop-encoder(threshold=-1.0)"):
        with tokensieve.attach(model, spec):
            reduced = outputs(model, family, kind)
            assert not torch.equal(reduced[0], unhooked[0])
        assert models.footprint(model) == before
    got = outputs(model, family, kind)
    assert all(torch.equal(a, b) for a, b in zip(got, unhooked, strict=True))


# -- law 4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["tome(keep=5)", "adaptive"])
@each_family
def test_beams_turns_and_plain_forwards(family, spec, deviation):
    spec = ADAPTIVE[family] if spec == "adaptive" else spec
    model, samples = models.tiny_model(family), prompts.batch(family, "mixed")
    inputs = prompts.collate(family, samples)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    with tokensieve.attach(model, spec) as sieve, torch.no_grad():
        together = model.generate(**inputs, **beams)[:, -4:]
        decided = [[r.kept.tolist() for r in row] for row in sieve.last]
        greedy = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
        plain = model(**inputs)
        assert deviation("of a plain forward", plain.logits[:, -1], greedy.logits[0]) <= NOISE
        assert [[r.kept.tolist() for r in row] for row in sieve.last] == decided
        ids = torch.cat([greedy.sequences, torch.arange(11, 15).expand(len(samples), -1)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(samples), 7, dtype=torch.long)], 1)
        turn = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 3, **prompts.GREEDY}
        second = model.generate(**turn, past_key_values=greedy.past_key_values)
        again = model.generate(**turn, pixel_values=inputs["pixel_values"])
        assert deviation("of a second turn (law 4)", torch.stack(second.logits), torch.stack(again.logits)) <= NOISE
        for i, s in enumerate(samples):
            if s.images:
                own = model.generate(**prompts.collate(family, [s]), **beams)[:, -4:]
                assert together[2 * i : 2 * i + 2].tolist() == own.tolist()


@each_family
def test_a_replay_averages_the_output_of_the_whole_encoder(family):
    """A replay applies W of the decision to the rows of the unreduced encoder, as documented."""
    samples = prompts.batch(family, "ragged")
    *_, decisions, _ = generate(family, samples, "tome(keep=9)")
    seen, model = [], models.tiny_model(family)
    with tokensieve.attach(model, decisions):
        hook = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["mm_encoder_outputs"]["image"].pooler_output),
            with_kwargs=True,
        )
        model.generate(**prompts.collate(family, samples), max_new_tokens=1)
        hook.remove()
    images = [image for s in samples for image in s.images]
    with torch.no_grad():
        pixels = torch.cat([image.pixels for image in images])
        whole = models.unhooked(family).model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    flat = [decision for row in decisions for decision in row]
    expected = torch.cat([decision.matrix() @ rows for decision, rows in zip(flat, whole, strict=True)])
    torch.testing.assert_close(torch.cat([*seen[0]]).view_as(expected), expected, atol=1e-5, rtol=1e-5)


def test_a_new_method_is_in_the_laws(registry, deviation):
    """No list in the tests names methods: one that is registered is replayed in every way."""
    before = replayed_cells()

    @tokensieve.register("drop-last", paper="none", stage="encoder")
    @dataclass(frozen=True)
    class DropLast(EncoderMethod):
        """Merge the last token into the first."""

        layers: tuple[int, ...] = (0,)

        def reduce(self, image):
            into = torch.arange(image.total).expand(len(image.features), -1).clone()
            into[:, -1] = 0
            weight = torch.ones_like(into, dtype=torch.float32)
            weight[:, 0] = weight[:, -1] = 0.5
            return image.merge_into(into, weight)

    new = [cell for cell in replayed_cells() if cell not in before]
    assert {cell.spec for cell in new} == {"drop-last(layers=(1, 2))"}
    assert len(new) == len(FAMILIES) * 6
    test_oracle(new[0], deviation)
    test_conservation(new[0], deviation)
    assert new[0].run[3][0] == [[23] * 3]
