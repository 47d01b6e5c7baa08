"""``attach(separators="none")``: a reduced image loses its newlines, so that exactly ``keep`` tokens stay."""

import pytest
import torch

import tokensieve
from tests.support import models, prompts
from tests.support.families import CORE
from tokensieve import Reduction
from tokensieve.check import Laws
from tokensieve.measure import measure_costs
from tokensieve.methods import parse
from tokensieve.models import TokenLayout

SPECS = [
    "uniform(keep=9)",
    "vtc-cls(keep=3)",
    "divprune(keep=0.2)",
    "pool(keep=14)",
    "visionzip(keep=8)",
    "hired(keep=5)",
]
INSIDE = ["fastv(layer=1, keep=4)", "pyramiddrop(layers=(1, 2), keep=3)"]


def run(name, kind, spec, model=None, **more):
    model = model or models.tiny_model(name)
    with tokensieve.attach(model, spec, **more) as sieve:
        out = model.generate(**prompts.collate(name, prompts.batch(name, kind)), max_new_tokens=2, **prompts.GREEDY)
    return out, sieve


def images_and_decisions(name, kind, sieve):
    for sample, row in zip(prompts.batch(name, kind), sieve.last, strict=True):
        yield from zip(sample.images, row, strict=True)


@pytest.mark.parametrize("spec", [*SPECS, *INSIDE])
@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
def test_the_same_patches_stay_and_no_newline(name, spec):
    _, with_newlines = run(name, "one-and-two", spec)
    _, without = run(name, "one-and-two", spec, separators="none")
    kept_newlines = 0
    for (image, both), (_, alone) in zip(
        images_and_decisions(name, "one-and-two", with_newlines),
        images_and_decisions(name, "one-and-two", without),
        strict=True,
    ):
        assert not both.whole
        newlines = torch.isin(both.kept, torch.tensor(image.newlines))
        kept_newlines += int(newlines.sum())
        if spec not in INSIDE:  # the rows that an LLM's layer reads depend on the newlines before it
            assert alone.kept.tolist() == both.kept[~newlines].tolist()
            assert torch.equal(alone.matrix(), both.matrix()[~newlines])
        assert not torch.isin(alone.kept, torch.tensor(image.newlines)).any()
        assert alone.slots == both.slots - int(newlines.sum())
    assert kept_newlines, "the two ways are the same here"


@pytest.mark.parametrize("spec", ["uniform(keep=9)", "vtc-cls(keep=3)"])
def test_the_answer_is_that_of_replaying_the_kept_tokens(spec):
    reduced, sieve = run("llava-next", "one-and-two", spec, separators="none")
    replayed, _ = run("llava-next", "one-and-two", sieve.last)
    assert torch.equal(reduced.sequences, replayed.sequences)
    assert torch.equal(reduced.logits[0], replayed.logits[0])


@pytest.mark.parametrize("spec", ["uniform(keep=500)", "fastv(layer=1, keep=500)"])
def test_an_image_that_is_kept_whole_keeps_its_newlines(spec):
    whole, sieve = run("llava-next", "ragged", spec, separators="none")
    assert all(decision.whole for _, decision in images_and_decisions("llava-next", "ragged", sieve))
    unhooked = models.unhooked("llava-next")
    inputs = prompts.collate("llava-next", prompts.batch("llava-next", "ragged"))
    assert torch.equal(whole.sequences, unhooked.generate(**inputs, max_new_tokens=2, **prompts.GREEDY).sequences)


def test_a_stage_in_the_llm_leaves_no_newline_of_an_image_that_it_shortens():
    _, sieve = run("llava-next", "one-and-two", "uniform(keep=500) + fastv(layer=1, keep=4)", separators="none")
    for image, decision in images_and_decisions("llava-next", "one-and-two", sieve):
        assert decision.slots == 4
        assert not set(decision.kept.tolist()) & set(image.newlines)
    _, sieve = run("llava-next", "one-and-two", "uniform(keep=9) + fastv(layer=1, keep=4)", separators="none")
    assert [decision.slots for _, decision in images_and_decisions("llava-next", "one-and-two", sieve)] == [4] * 4


@pytest.mark.parametrize("name", CORE)
def test_families_without_separators_are_unchanged(name):
    (default, _), (none, _) = (run(name, "ragged", "uniform(keep=4)", separators=s) for s in ("kept-lines", "none"))
    assert torch.equal(default.logits[0], none.logits[0])


def test_merged_parts_without_separators():
    """Two views of 4 tokens, a newline after each pair."""
    places = torch.tensor([0, 1, 3, 4, 6, 7, 9, 10])
    line = torch.arange(4).repeat_interleave(3)
    layout = TokenLayout(12, ((2, 2), (2, 2)), line=line, patch_index=places, separators="none")
    image = tokensieve.VisualTokens(torch.randn(1, 4, 3), grid=(2, 2))
    weight = torch.tensor([[0.5, 0.25, 0.25]])
    merged = image.merge(torch.tensor([[1]]), torch.tensor([[0, 0, 0]]), torch.tensor([[0, 1, 2]]), weight)[0]
    kept = image.keep(torch.tensor([[2, 3]]))[0]
    lifted = layout.merge_parts([merged, kept])
    assert lifted.anchors.tolist() == [1, 9, 10]
    expected = torch.zeros(3, 12)
    expected[0, [0, 1, 3]] = weight[0]
    expected[[1, 2], [9, 10]] = 1
    assert torch.equal(lifted.matrix(), expected)
    assert layout.merge_parts([Reduction.identity(4), Reduction.identity(4)]).whole
    assert layout.left(torch.tensor([1, 9, 10])).patches == 3


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="separators must be 'kept-lines' or 'none'; got 'some'"):
        tokensieve.attach(models.tiny_model("llava-next"), "uniform", separators="some")


def test_the_laws_hold_without_separators():
    name = "llava-next"
    samples = prompts.batch(name, "one-and-two")
    laws = Laws(
        models.tiny_model(name),
        lambda numbers: prompts.collate(name, [samples[i] for i in numbers]),
        separators="none",
    )
    for spec in ("uniform(keep=9)", "pool(keep=14)", "fastv(layer=1, keep=4)"):
        assert {verdict.status for verdict in laws.check(parse(spec))} == {"pass"}, spec


@pytest.mark.parametrize(("separators", "tokens"), [("kept-lines", 13), ("none", 9)])
def test_costs_are_those_of_the_rule(separators, tokens):
    inputs = prompts.collate("llava-next", prompts.batch("llava-next", "single"))
    options = {"repeats": 1, "warmup": 0, "decode_tokens": 1, "separators": separators}
    _, cost = measure_costs(models.tiny_model("llava-next"), inputs, ["uniform(keep=9)"], **options)
    assert cost.tokens_after == tokens
