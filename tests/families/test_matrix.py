"""Laws 1 to 5 on every family: methods of every kind, both kernels, one prompt and a ragged batch with several images.

A family is one entry of ``families.FAMILIES``; what it cannot give is refused, with the words in ``REFUSED``.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property

import pytest
import torch

import tokensieve
from tests.support import families, models, oracle, prompts
from tests.support.oracle import noise
from tokensieve import Reduction
from tokensieve.models import family_of
from tokensieve.reduction import Mixing

STEPS, WORDS = 4, [11, 12, 13]
METHODS = {
    "attention": "fastervlm(keep=5)",
    "features": "divprune(keep=5)",
    "text": "trsm(keep=5)",
    "merging": "visionzip(keep=7, before_projector=False)",
    "inside": "fastv(layer=1, keep=5)",
}
REFUSED = {
    "qwen3.5": {"inside": "linear"},
    "llava-onevision-resampled": {"attention": "resamples an image", "merging": "resamples an image"},
}
NO_PROJECTOR = ("ovis2", "lighton-ocr")  # there is none, or none is known

each_kernel = pytest.mark.parametrize("attention", ["sdpa", "eager"])
each_batch = pytest.mark.parametrize("batch", ["single", "one-and-two"])


def supported(name):
    return [kind for kind in METHODS if kind not in REFUSED.get(name, {})]


each_name = pytest.mark.parametrize("name", [name for name in families.FAMILIES if supported(name)])


@cache
def encoded(name, attention, batch):
    """Features of every image, `[sample][image]`, each sample by itself."""
    return [oracle.encode(models.unhooked(name, attention), name, s) for s in prompts.batch(name, batch)]


@cache
def outputs(name, attention, batch, hooked):
    """Logits and tokens of generate, and those of a plain forward."""
    model, inputs = (models.tiny_model if hooked else models.unhooked)(name, attention), collate(name, batch)
    out = model.generate(**inputs, max_new_tokens=2, **prompts.GREEDY)
    with torch.no_grad():
        return [*out.logits, out.sequences, model(**inputs).logits]


def collate(name, batch):
    return prompts.collate(name, prompts.batch(name, batch))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- law 1 --------------------------------------------------------------------------------------------------------


@each_batch
@each_kernel
@each_name
def test_keeping_all_changes_no_bit(name, attention, batch):
    model, unhooked = models.tiny_model(name, attention), outputs(name, attention, batch, False)
    assert same(outputs(name, attention, batch, True), unhooked)
    before = models.footprint(model)
    for kind in supported(name):
        spec = METHODS[kind].replace("keep=5", "keep=1.0").replace("keep=7", "keep=1.0")
        with tokensieve.attach(model, spec) as sieve:
            assert same(outputs.__wrapped__(name, attention, batch, True), unhooked), spec
            assert all(r.whole for row in sieve.last for r in row)
        assert models.footprint(model) == before, spec
    assert same(outputs.__wrapped__(name, attention, batch, True), unhooked)


# -- laws 2 to 5 --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A batch of one family with one method: a first turn, a second one on its cache, and each row's own run."""

    name: str
    kind: str
    attention: str
    batch: str

    def __str__(self) -> str:
        return "-".join([self.name, self.kind, self.attention, self.batch])

    @property
    def samples(self):
        return prompts.batch(self.name, self.batch)

    @cached_property
    def run(self):
        """Logits of all steps `[row, step, vocabulary]`, answers of both turns, decisions, and the rows' own runs."""
        inputs = collate(self.name, self.batch)
        with tokensieve.attach(models.tiny_model(self.name, self.attention), METHODS[self.kind]) as sieve:
            first = sieve.model.generate(**inputs, max_new_tokens=STEPS, **prompts.GREEDY)
            decisions, turn = sieve.last, longer(self.name, inputs, first.sequences)
            second = sieve.model.generate(
                **turn, max_new_tokens=2, past_key_values=first.past_key_values, **prompts.GREEDY
            )
            alone = [own(sieve.model, self.name, s, sieve) for s in self.samples] if len(self.samples) > 1 else []
        answers = first.sequences[:, -STEPS:].tolist(), second.sequences[:, -2:].tolist()
        return torch.stack([*first.logits, *second.logits], 1), answers, decisions, alone

    @cached_property
    def by_hand(self):
        """Per row, logits of all steps; one sequence holds both turns."""
        rows = []
        for i, (answer, after) in enumerate(zip(*self.run[1], strict=True)):
            tail = [*answer, *WORDS, *after]
            logits = hand(self.name, self.attention, self.batch, i, self.kind, self.run[2][i], tail[:-1])
            rows.append(torch.cat([logits[:STEPS], logits[-2:]]))
        return rows


BATCHES = ("one-and-two", "single")
CELLS = [
    Cell(name, kind, attention, batch)
    for batch in BATCHES
    for name in families.FAMILIES
    for kind in supported(name)
    for attention in ("sdpa", "eager")
]


@pytest.fixture(scope="module", params=CELLS, ids=str)
def cell(request):
    return replace(request.param)  # its cached run goes with it


def test_oracle(cell, deviation):
    """Law 2."""
    for logits, by_hand, answer in zip(cell.run[0], cell.by_hand, cell.run[1][0], strict=True):
        worst = deviation("from the hand reference (law 2)", logits[:STEPS], by_hand[:STEPS])
        assert worst <= noise(cell.name)
        assert by_hand[:STEPS].argmax(-1).tolist() == answer


@pytest.mark.parametrize("cell", [c for c in CELLS if c.batch != "single"], ids=str, indirect=True, scope="module")
def test_each_row_is_its_own_run(cell, deviation):
    """Law 3; the logits of later steps are by hand already."""
    logits, _, decisions, alone = cell.run
    for i, (own_logits, own_decisions) in enumerate(alone):
        assert [r.kept.tolist() for r in own_decisions] == [r.kept.tolist() for r in decisions[i]]
        assert deviation("of a row from its own run (law 3)", logits[i, 0], own_logits) <= noise(cell.name)


def test_continuation(cell, deviation):
    """Law 4."""
    for logits, by_hand, after in zip(cell.run[0], cell.by_hand, cell.run[1][1], strict=True):
        assert deviation("of a second turn (law 4)", logits[STEPS:], by_hand[STEPS:]) <= noise(cell.name)
        assert by_hand[STEPS:].argmax(-1).tolist() == after


def test_conservation(cell):
    """Law 5, and the rule for newlines: one stays if a patch of its row does."""
    decisions = cell.run[2]
    assert [len(row) for row in decisions] == [len(s.images) for s in cell.samples]
    for s, row in zip(cell.samples, decisions, strict=True):
        for image, decision in zip(s.images, row, strict=True):
            assert_conserved(image, decision, cell.kind)


def hand(name, attention, batch, i, kind, decisions, answer):
    """Logits after the prompt and after each token of ``answer``, of sample ``i`` with these decisions."""
    model, s = models.unhooked(name, attention), prompts.batch(name, batch)[i]
    kept = [r.kept.tolist() for r in decisions]
    if kind == "inside":
        assert all(r.mixing is None for r in decisions)
        chosen_by_attention(name, s, kept)
        return oracle.logits_inside(model, name, s, {1: kept}, answer)
    assert all(r.projected for r in decisions)
    rows = [e.mixed(r.matrix()) for e, r in zip(encoded(name, attention, batch)[i], decisions, strict=True)]
    return oracle.logits(model, name, s, kept, rows, answer)


def chosen_by_attention(name, sample, kept):
    """FastV's choice: no patch that was dropped gets more attention from the last prompt token than one that stayed."""
    for image, scores, stay in zip(sample.images, attended(name, sample), kept, strict=True):
        patches = set(range(image.tokens)) - set(image.newlines)
        dropped = sorted(patches - set(stay))
        if dropped:
            assert scores[sorted(patches & set(stay))].min() >= scores[dropped].max() - 1e-5


@cache
def attended(name, sample):
    return oracle.attended(models.unhooked(name, "eager"), name, sample, 0)


def own(model, name, sample, sieve):
    """First logits and decisions of a sample's own run."""
    out = model.generate(**prompts.collate(name, [sample]), max_new_tokens=1, **prompts.GREEDY)
    return out.logits[0][0], sieve.last[0]


def longer(name, inputs, sequences):
    """The same prompts with what was answered and ``WORDS`` appended; without the images."""
    rows, added = len(sequences), sequences.shape[1] - inputs["input_ids"].shape[1] + len(WORDS)
    out = {
        "input_ids": torch.cat([sequences, torch.tensor(WORDS).expand(rows, -1)], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(rows, added, dtype=torch.long)], 1),
    }
    kind = families.FAMILIES[name].types
    if kind:
        out[kind] = torch.cat([inputs[kind], torch.full((rows, added), int(name.startswith("paligemma")))], 1)
    return out


def assert_conserved(image, decision, kind):
    source, anchors = decision.source, decision.anchors.tolist()
    assert decision.total == image.tokens == len(source)
    assert anchors == sorted(set(anchors))
    assert set(source.tolist()) - {-1} == set(range(decision.slots))
    assert torch.equal((decision.matrix() != 0).sum(-1), decision.counts)
    if decision.mixing is None:
        assert torch.equal(source[decision.anchors], torch.arange(decision.slots))
        assert int((source >= 0).sum()) == decision.slots
    patches = [i for i in anchors if i not in image.newlines]
    assert set(anchors) - set(patches) == oracle.rows_left(image, patches)
    assert len(patches) == min(7 if kind == "merging" else 5, image.tokens - len(image.newlines))


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if "inside" in supported(name)])
def test_a_method_inside_after_one_before(name, deviation):
    """Decisions of two stages: what the second is given are the tokens, and the newlines, that the first left."""
    model, samples, inputs = models.tiny_model(name), prompts.batch(name, "one-and-two"), collate(name, "one-and-two")
    first, both = METHODS["features"], METHODS["features"] + " + fastv(layer=1, keep=3)"
    with tokensieve.attach(model, first) as sieve:
        model.generate(**inputs, max_new_tokens=1)
        entered = [[r.kept.tolist() for r in row] for row in sieve.last]
    with tokensieve.attach(model, both) as sieve:
        out = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
        kept = [[r.kept.tolist() for r in row] for row in sieve.last]
    for i, s in enumerate(samples):
        for image, before, after in zip(s.images, entered[i], kept[i], strict=True):
            patches = [at for at in after if at not in image.newlines]
            assert set(after) <= set(before)
            assert len(patches) == 3
            assert set(after) - set(patches) == oracle.rows_left(image, patches)
        answer = out.sequences[i, -3:].tolist()
        by_hand = oracle.logits_inside(models.unhooked(name), name, s, {1: kept[i]}, answer[:-1], entered[i])
        assert deviation("of two stages", torch.stack(out.logits, 1)[i], by_hand) <= noise(name)


# -- rows before the projector --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in families.FAMILIES if "merging" in supported(n) and n not in NO_PROJECTOR])
def test_rows_before_the_projector_are_those_of_their_tokens(name, deviation):
    """A decision that mixes each token with nothing but itself, before the projector: its own features come out."""
    model, samples, inputs = models.tiny_model(name), prompts.batch(name, "one-and-two"), collate(name, "one-and-two")
    g = torch.Generator().manual_seed(0)

    def some(image):
        patches = [i for i in range(image.tokens) if i not in image.newlines]
        chosen = [patches[i] for i in torch.randperm(len(patches), generator=g)[:6].tolist()]
        kept = torch.tensor(sorted({*chosen, *oracle.rows_left(image, chosen)}))
        return Reduction(
            image.tokens, kept, Mixing(torch.arange(len(kept)), kept, torch.ones(len(kept))), projected=False
        )

    decisions = [[some(image) for image in s.images] for s in samples]
    with tokensieve.attach(model, decisions):
        out = model.generate(**inputs, max_new_tokens=1, **prompts.GREEDY)
    for i, s in enumerate(samples):
        rows = [e.mixed(r.matrix()) for e, r in zip(encoded(name, "sdpa", "one-and-two")[i], decisions[i], strict=True)]
        by_hand = oracle.logits(models.unhooked(name), name, s, [r.kept for r in decisions[i]], rows, [])
        assert deviation("of rows before the projector", out.logits[0][i], by_hand[0]) <= noise(name)


def test_ovis2_has_no_rows_before_its_projector():
    with pytest.raises(ValueError, match="mixtures of a visual vocabulary"):
        tokensieve.attach(models.tiny_model("ovis2"), "visionzip(keep=7)")


# -- other calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@each_name
def test_a_plain_forward_equals_the_hand_reference(name, positions, deviation):
    """Every position's logits, without a cache, under both position policies."""
    model, samples = models.tiny_model(name), prompts.batch(name, "one-and-two")
    inputs = collate(name, "one-and-two")
    with torch.no_grad(), tokensieve.attach(model, METHODS["features"], positions=positions) as sieve:
        got = model(**inputs, use_cache=False).logits
    for i, s in enumerate(samples):
        kept = [r.kept for r in sieve.last[i]]
        features = encoded(name, "sdpa", "one-and-two")[i]
        rows = [e.mixed(r.matrix()) for e, r in zip(features, sieve.last[i], strict=True)]
        sequence = oracle.enter(models.unhooked(name), name, s, kept, rows, [])
        if positions == "contiguous":
            sequence.positions = torch.arange(sequence.prompt).expand_as(sequence.positions)
        by_hand = oracle.forward(models.unhooked(name), name, sequence)
        assert deviation("of a plain forward", got[i, -sequence.prompt :], by_hand) <= noise(name)


# -- refusals, beams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in REFUSED for kind in REFUSED[name]])
def test_evidence_that_a_family_cannot_give_is_refused(name, kind):
    model = models.tiny_model(name)
    before = models.footprint(model)
    with pytest.raises(ValueError, match=REFUSED[name][kind]), tokensieve.attach(model, METHODS[kind]):
        model.generate(**collate(name, "single"), max_new_tokens=1)  # where only the images show that it is impossible
    assert models.footprint(model) == before


@each_name
def test_beams_of_a_batch_are_those_of_each_row(name):
    model, samples = models.tiny_model(name), prompts.batch(name, "one-and-two")
    if name == "glm4v":  # several images are refused: see test_family_details
        samples = [s for s in samples if len(s.images) == 1]
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3, "do_sample": False}
    with tokensieve.attach(model, METHODS["features"]) as sieve:
        together = model.generate(**prompts.collate(name, samples), **beams)[:, -3:]
        assert [len(row) for row in sieve.last] == [len(s.images) for s in samples]
        for i, s in enumerate(samples):
            alone = model.generate(**prompts.collate(name, [s]), **beams)[:, -3:]
            assert together[2 * i : 2 * i + 2].tolist() == alone.tolist()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_is_known_but_the_one_that_is_discovered(name):
    model_type, family = models.tiny_model(name).config.model_type, family_of(models.tiny_model(name))
    assert (model_type in getattr(family, "model_types", ())) == (name != "lighton-ocr")
    assert ("untested" in family.title) == (name == "lighton-ocr")
