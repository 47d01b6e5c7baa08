"""Laws 2, 3, 5 and 6 inside the LLM: every method, family, kernel, batch and policy against a layer loop by hand.

Methods that are restated in ``tests/methods/decoder/rules.py`` decide by these rules in the layer loop. Of every method
in the registry the recorded decisions are replayed there as well.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.laws.cell import Cell
from tests.methods.decoder.rules import COMPOSED, RULES
from tests.methods.decoder.runs import STEPS, by_hand_run, entering, generate
from tests.support import families, models, oracle, prompts
from tests.support.methods import inside_specs, recorded
from tests.support.oracle import NOISE
from tokensieve.methods import DecoderMethod


@dataclass(frozen=True)
class DecoderCell(Cell):
    """Greedy steps with a method inside the LLM, and each sample layer by layer by hand."""

    @cached_property
    def _run(self):
        model = models.tiny_model(self.family, self.attention)
        with recorded(model.model.language_model.layers, self.spec.split(" + ")[-1]) as recording:
            return *generate(self.family, self.attention, self.samples, self.spec, self.policy), recording

    @property
    def logits(self) -> Tensor:
        return self._run[0]

    @property
    def answers(self) -> list[list[int]]:
        return self._run[1].tolist()

    @property
    def held(self) -> list[int]:
        """Columns of each layer's cache."""
        return [layer.keys.shape[-2] for layer in self._run[2].layers]

    @property
    def sieve(self):
        return self._run[3]

    @cached_property
    def by_hand(self) -> list[tuple[Tensor, oracle.Sequence]]:
        """Per sample, logits and the sequence at the end."""
        decide = self._replay if self.replayed else None
        return [
            by_hand_run(self.spec, self.family, self.kind, self.policy, row, answer[:-1], decide)
            for row, answer in enumerate(self.answers)
        ]

    def _replay(self, layer: oracle.Layer, sequence: oracle.Sequence) -> list[oracle.Decision] | None:
        """The method's own decisions, found by the rows that it received."""
        images = [sequence.rows[image] for image in sequence.images]
        normed = layer.decoder.norm  # for methods whose needs name the final norm
        decisions = [self._run[4].decision(layer.number, rows, normed(rows)) for rows in images]
        return None if None in decisions else decisions


POLICIES, KERNELS, BATCHES = ("original", "contiguous"), ("sdpa", "eager"), ("ragged", "two-images")
CONTIGUOUS = ("fastv(layer=1, keep=13)", "pyramiddrop(keep=0.2)", "pool-decoder(layer=1, stride=3)")
RULED = {tokensieve.parse(spec)[0].info.name for spec in RULES}
CELLS = [
    *(DecoderCell(s, f, a, b, p) for s, a, f, b, p in product(RULES, KERNELS, families.DEEP, BATCHES, POLICIES)),
    # "mixed" holds a long row of text alone: the batch stays as wide, because no token of that row is dropped
    *(DecoderCell(s, f, "sdpa", "mixed", "original") for s, f in product(RULES, families.DEEP)),
    *(DecoderCell(s, f, "eager", "mixed", "contiguous") for s, f in product(CONTIGUOUS, families.DEEP)),
    # after a connector method
    *(DecoderCell(s, f, "sdpa", b, p) for s, f, b, p in product(COMPOSED, families.DEEP, BATCHES, POLICIES)),
]


def replayed_cells() -> list[DecoderCell]:
    """Every registered method: one cell for each family, and all of them where no rule by hand exists."""
    ways = list(product(KERNELS, (*BATCHES, "mixed"), POLICIES))
    return [
        DecoderCell(spec, family, *way, replayed=True)
        for spec, family in product(inside_specs("decoder"), families.DEEP)
        for way in ([("sdpa", "mixed", "original")] if spec.split("(")[0] in RULED else ways)
    ]


@pytest.fixture(scope="module", params=[*CELLS, *replayed_cells()], ids=str)
def cell(request):
    return replace(request.param)  # its cached run goes with it


def test_oracle(cell, deviation):
    """Law 2: the tokens that are left and the logits of every greedy step are those by hand."""
    for row, (logits, sequence) in enumerate(cell.by_hand):
        assert [r.kept.tolist() for r in cell.sieve.last[row]] == sequence.kept, "the tokens that are left"
        assert deviation("from the layer loop by hand (law 2)", cell.logits[row], logits) <= NOISE
        assert logits.argmax(-1).tolist() == cell.answers[row]


def test_conservation(cell):
    """Law 5: each original token is in one of the final slots or dropped, over all stages; weights are averages."""
    connector = entering(cell.spec, cell.family, cell.kind)
    for s, row, entered, (_, sequence) in zip(cell.samples, cell.sieve.last, connector, cell.by_hand, strict=True):
        for image, decision, first, matrix in zip(s.images, row, entered, sequence.matrices, strict=True):
            assert decision.total == image.tokens == len(decision.source)
            assert decision.grid == image.grid
            assert bool((decision.anchors.diff() > 0).all())
            assert set(decision.source.tolist()) - {-1} == set(range(decision.slots))
            assert torch.allclose(decision.weight_sums, torch.ones(decision.slots), atol=1e-6)
            assert torch.equal((decision.matrix() != 0).sum(-1), decision.counts)
            assert torch.allclose(decision.matrix(), matrix @ first.matrix(), atol=1e-6)


def test_tokens_and_cache_columns_of_each_layer(cell):
    """Law 6: each layer computes on, and its cache holds, the columns that are left; or those left at the end."""
    widest = [0] * families.DEPTH
    for s, tokens, (_, sequence) in zip(cell.samples, cell.sieve.tokens, cell.by_hand, strict=True):
        assert tokens == [[counts[image] for counts in sequence.counts] for image in range(len(s.images))]
        lost = [sum(image.tokens for image in s.images) - sum(counts) for counts in sequence.counts]
        widest = [max(w, len(s.ids) - n) for w, n in zip(widest, lost, strict=True)]
    if tokensieve.parse(cell.spec)[-1].leaves_caches:
        widest = widest[-1:] * families.DEPTH
    assert cell.held == [w + STEPS - 1 for w in widest]


@pytest.mark.parametrize("family", families.DEEP)
@pytest.mark.parametrize("spec", RULES)
def test_a_row_of_a_batch_is_its_own_run(spec, family, deviation):
    """Law 3."""
    samples = prompts.batch(family, "ragged")
    logits, tokens, _, sieve = generate(family, "sdpa", samples, spec, "original")
    for i, sample in enumerate(samples[:2]):
        own_logits, own_tokens, _, own = generate(family, "sdpa", [sample], spec, "original")
        assert [r.kept.tolist() for r in own.last[0]] == [r.kept.tolist() for r in sieve.last[i]]
        assert deviation("of a batch row from its own run (law 3)", logits[i], own_logits[0]) <= NOISE
        assert torch.equal(own_tokens[0], tokens[i])


def test_a_new_method_is_in_the_laws(registry):
    """No list in the tests names methods: one that is registered is replayed in every way."""
    before = replayed_cells()

    @tokensieve.register("every-second", paper="none", stage="decoder")
    @dataclass(frozen=True)
    class EverySecond(DecoderMethod):
        """Keep every second token."""

        layer: int = 4

        def reduce(self, image):
            return image.keep(torch.arange(0, image.total, 2).expand(len(image.features), -1))

    new = [cell for cell in replayed_cells() if cell not in before]
    assert {cell.spec for cell in new} == {"every-second(layer=2)"}
    assert len(new) == len(families.DEEP) * 12
    logits, sequence = new[0].by_hand[0]
    assert sequence.counts[1:3] == [[25], [13]]
    assert torch.allclose(new[0].logits[0], logits, atol=NOISE)
