"""Laws 2, 3, 5 and 6 before the LLM: every method, family, kernel, batch and position policy.

One cell of the matrix generates a batch, and each law is a test on it. Batch 1 is in it twice: as the rows' own runs,
and as "two-images". Methods that are not tuned by hand run in the whole matrix.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product

import pytest
import torch

import tokensieve
from tests.laws.cell import Cell
from tests.support import families, models, oracle, prompts
from tests.support.methods import FIRST_TUNED, TUNED, connector_specs, made_specs
from tests.support.oracle import NOISE


@dataclass(frozen=True)
class ConnectorCell(Cell):
    """Greedy steps with a connector method: ``logits`` `[row, step, vocabulary]`, and the same by hand."""

    steps: int = 8

    @cached_property
    def run(self):
        """Logits, tokens `[row][step]`, decisions `[row][image]`, and the columns held in the caches."""
        return generate(self, self.samples)

    @property
    def logits(self):
        return self.run[0]

    @property
    def answers(self) -> list[list[int]]:
        return self.run[1]

    @property
    def decisions(self):
        return self.run[2]

    def by_hand(self, row: int) -> torch.Tensor:
        """The unmodified LLM's logits, given the rows that the decisions make of the images."""
        model, s, decisions = models.unhooked(self.family, self.attention), self.samples[row], self.decisions[row]
        (first, *_) = tokensieve.parse(self.spec)
        encoded = [
            oracle.reduced(self.family, self.attention, image, decision, resized(first, image))
            for image, decision in zip(s.images, decisions, strict=True)
        ]
        kept, answer = [r.kept for r in decisions], self.answers[row]
        return oracle.logits(model, self.family, s, kept, encoded, answer[:-1], self.policy)


def generate(cell: ConnectorCell, samples):
    with tokensieve.attach(models.tiny_model(cell.family, cell.attention), cell.spec, positions=cell.policy) as sieve:
        inputs = prompts.collate(cell.family, samples)
        out = sieve.model.generate(**inputs, max_new_tokens=cell.steps, **prompts.GREEDY)
        held = {layer.keys.shape[-2] for layer in out.past_key_values.layers}
        return torch.stack(out.logits, 1), out.sequences[:, -cell.steps :].tolist(), sieve.last, held


@cache
def row_run(cell: ConnectorCell, row: int):
    """The batch-1 run of one sample."""
    return generate(cell, cell.samples[row : row + 1])


def resized(method, image):
    """(height, width) in tokens at which the vision encoder receives the image; ``None``: as it is."""
    if method.info.name != "downsample":
        return None
    budget = method.keep if isinstance(method.keep, int) else max(1, round(method.keep * image.tokens))
    return oracle.largest_grid(image.grid, budget) if budget < image.tokens else None


KERNELS, POLICIES, KINDS = ("sdpa", "eager"), ("original", "contiguous"), ("ragged", "two-images")
SPECS = [(spec, family) for family in families.CORE for spec in connector_specs(family)]
OTHER_WAYS = (("sdpa", "contiguous"), ("eager", "original"), ("eager", "contiguous"))
TUNED_MIXED = [
    ConnectorCell(spec, family, attention, "mixed", policy, steps=3)
    for spec, family, (attention, policy) in product(FIRST_TUNED.values(), families.CORE, OTHER_WAYS)
]
MADE = [
    *(ConnectorCell(s, f, "sdpa", kind, steps=3) for f in families.CORE for s in made_specs(f) for kind in KINDS),
    *(ConnectorCell(s, f, a, "mixed", p, steps=3) for f in families.CORE for s in made_specs(f) for a, p in OTHER_WAYS),
]
BATCHES = [
    *TUNED_MIXED,
    *MADE,
    *(
        ConnectorCell(spec, family, "sdpa", "ragged", "original", steps=3)
        for spec, family in product(TUNED, families.CORE)
    ),
    *(ConnectorCell(*spec, *way) for spec, way in product(SPECS, product(KERNELS, ("ragged", "mixed"), POLICIES))),
]
# the cells of BATCHES come first, so that pytest runs all tests on one cell in a row: the fixture runs the model once
CELLS = [*BATCHES, *(ConnectorCell(*s, a, "two-images", p) for s, a, p in product(SPECS, KERNELS, POLICIES))]


@pytest.fixture(scope="module", params=CELLS, ids=str)
def cell(request):
    return replace(request.param)  # its cached run goes with it


def test_oracle(cell, deviation):
    """Law 2: prefill and greedy steps are those of the unmodified LLM, fed with the kept rows by hand."""
    for row, answer in enumerate(cell.answers):
        by_hand = cell.by_hand(row)
        assert deviation("from the hand reference (law 2)", cell.logits[row], by_hand) <= NOISE
        assert by_hand.argmax(-1).tolist() == answer


@pytest.mark.parametrize("cell", BATCHES, ids=str, indirect=True, scope="module")
def test_each_row_is_its_own_run(cell, deviation):
    """Law 3."""
    rows = range(1) if cell.steps == 3 and cell.kind == "mixed" else range(len(cell.samples))
    for row in (row for row in rows if cell.samples[row].images):
        logits, (answer,), (decisions,), _ = row_run(cell, row)
        assert [r.kept.tolist() for r in decisions] == [r.kept.tolist() for r in cell.decisions[row]]
        assert deviation("of a batch row from its own run (law 3)", cell.logits[row], logits[0]) <= NOISE
        assert answer == cell.answers[row]


def test_conservation(cell):
    """Law 5: each original token is in a slot or dropped, and budgets are kept."""
    for s, decisions in zip(cell.samples, cell.decisions, strict=True):
        for image, decision in zip(s.images, decisions, strict=True):
            assert decision.total == image.tokens == len(decision.source)
            assert bool((decision.anchors.diff() > 0).all())
            assert torch.equal((decision.matrix() != 0).sum(-1), decision.counts)
            if cell.spec not in TUNED and decision.rows is None:
                assert_weights_and_budget(decision, image, cell.spec)


def assert_weights_and_budget(decision, image, spec):
    source, anchors = decision.source, decision.anchors
    assert int(anchors[0]) >= 0
    assert int(anchors[-1]) < image.tokens
    assert set(source.tolist()) - {-1} == set(range(decision.slots)), "a slot that no token is listed under"
    assert torch.allclose(decision.weight_sums, torch.ones(decision.slots), atol=1e-6)
    if decision.mixing is None:
        assert torch.equal(source[anchors], torch.arange(decision.slots))
        assert int((source >= 0).sum()) == decision.slots
    budgets = [m.keep for m in tokensieve.parse(spec) if hasattr(m, "keep")]
    count = image.tokens
    for keep in budgets:  # every stage leaves at most its budget of what it is given
        count = min(count, keep if isinstance(keep, int) else max(1, round(keep * count)))
    assert decision.slots <= count
    if budgets and "pool" not in spec and "downsample" not in spec:
        assert decision.slots == count
    if decision.whole and budgets:
        assert any("kept whole" in note for note in decision.notes)


def test_cache_columns(cell):
    """Law 6: the cache holds the columns that are left; the padding that all rows shared is gone."""
    kept = [[r.kept for r in decisions] for decisions in cell.decisions]
    lengths = [len(oracle.kept_columns(s, of_row)) for s, of_row in zip(cell.samples, kept, strict=True)]
    assert cell.run[3] == {max(lengths) + cell.steps - 1}


@pytest.mark.parametrize("cell", TUNED_MIXED, ids=str, indirect=True, scope="module")
def test_the_choice_does_not_depend_on_kernel_and_positions(cell):
    usual = generate(replace(cell, attention="sdpa", policy="original"), cell.samples)[2]
    kept = [[[r.kept.tolist() for r in row] for row in decisions] for decisions in (cell.decisions, usual)]
    assert kept[0] == kept[1]


def test_a_new_method_is_in_the_laws(registry, deviation):
    """No list in the tests names methods: one that is registered runs in the whole matrix."""
    before = set(connector_specs())

    @tokensieve.register("first-tokens", paper="none")
    @dataclass(frozen=True)
    class FirstTokens(tokensieve.Method):
        """Keep the first tokens."""

        keep: int | float = 4

        def reduce(self, image):
            return image.keep(torch.arange(image.budget).expand(len(image.features), -1))

    assert set(connector_specs()) - before == {"first-tokens(keep=13)", "first-tokens(keep=0.3)"}
    cell = ConnectorCell("first-tokens(keep=0.3)", "qwen2.5-vl", steps=2)
    test_oracle(cell, deviation)
    test_conservation(cell)
