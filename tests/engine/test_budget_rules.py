"""Budgets in words, in models: averages over the layers of the LLM, and over the images of the data."""

import re

import pytest
import torch

import tokensieve
from tests.support import models, prompts
from tokensieve import Refusal, parse
from tokensieve.methods.adaptive import bounds
from tokensieve.vllm.settings import unserved, with_keep

NAMES = ("qwen2.5-vl", "llava-next", "idefics3")  # images of unequal sizes; newlines; tiles that are images
DEEP = "llava-clip-deep"
CURVES = (
    "divprune(keep='average:8:gain:0.02')",
    "fastervlm(keep='average:8:mass:0.3')",
    "pool(keep='average:30%:rank:2')",
)


def prefill(name, samples, method, **more):
    model = models.tiny_model(name)
    with torch.no_grad(), tokensieve.attach(model, method, **more) as sieve:
        logits = model(**prompts.collate(name, samples), use_cache=False).logits
    return logits, sieve


def mean(layers):
    return sum(layers) / len(layers)


# -- over the layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["uniform + fastv(layer=2)", "uniform + pyramiddrop(layers=(2, 4))", "fastv(layer=1)"])
@pytest.mark.parametrize("wanted", [9, 13, 0.5, 0.7])
def test_every_image_has_the_average_over_the_layers(spec, wanted):
    _, sieve = prefill(DEEP, prompts.batch(DEEP, "two-images"), spec, keep=f"layers:{wanted!r}")
    for decision, layers in zip(sieve.last[0], sieve.tokens[0], strict=True):
        target = wanted if isinstance(wanted, int) else wanted * decision.total
        assert mean(layers) == pytest.approx(target, abs=1)
        assert layers == sorted(layers, reverse=True)


def test_the_stage_inside_keeps_its_published_share_of_what_enters():
    _, sieve = prefill(DEEP, prompts.batch(DEEP, "two-images"), "uniform + fastv(layer=2)", keep="layers:8")
    assert sieve.tokens[0][0] == [12, 12, 6, 6, 6, 6]  # fastv's published half; (2 * 12 + 4 * 6) / 6 = 8
    _, sieve = prefill(DEEP, prompts.batch(DEEP, "two-images"), "uniform + fastv(layer=2)", keep="layers:20")
    assert (sieve.tokens[0][0][0], mean(sieve.tokens[0][0])) == (25, pytest.approx(20, abs=0.7))  # all 25 enter


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        ("uniform(keep=15) + fastv(layer=2, keep='layers:9')", [15, 15, 6, 6, 6, 6]),
        ("uniform(keep='layers:9') + fastv(layer=2, keep=6)", [15, 15, 6, 6, 6, 6]),
        ("uniform(keep='layers:9') + fastv(layer=2, keep=0.25)", [18, 18, 4, 4, 4, 4]),
        ("uniform(keep='layers:9')", [9] * 6),
    ],
)
def test_a_number_stays_and_the_other_stage_is_solved_for(spec, tokens):
    _, sieve = prefill(DEEP, prompts.batch(DEEP, "two-images"), spec)
    assert sieve.tokens[0][0] == tokens


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_a_batch_has_the_numbers_of_its_own_run(name):
    samples = prompts.batch(name, "one-and-two")
    _, together = prefill(name, samples, "uniform + fastv(layer=1)", keep="layers:40%")
    for row, sample in enumerate(samples):
        _, alone = prefill(name, [sample], "uniform + fastv(layer=1)", keep="layers:40%")
        assert alone.tokens[0] == together.tokens[row]
        assert [r.kept.tolist() for r in alone.last[0]] == [r.kept.tolist() for r in together.last[row]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("uniform(keep=5) + fastv(keep='layers:9')", "an average of 9 tokens over the layers is out of reach"),
        ("fastv(layer=3, keep='layers:40%')", "all tokens that enter pass the first 3 of 6 layers"),
        ("uniform(keep='layers:9') + vtw", "decides by the content"),
        ("downsample(keep='layers:9')", "give it a number, as in downsample(keep=0.5)"),
        ("uniform(keep='layers:9') + fastv(keep='layers:8')", "got layers:8 and layers:9"),
        ("fastv(keep='layers:9', average=9)", "has both keep='layers:9' and an average"),
    ],
)
def test_averages_that_cannot_be_are_refused_when_attached(spec, message):
    with pytest.raises(Refusal, match=re.escape(message)):
        tokensieve.attach(models.tiny_model(DEEP), spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fastv(layer=3, keep='layers:9')", "an average of 9 of 25 tokens is out of reach"),
        ("uniform(keep='layers:20') + fastv(layer=2, keep=2)", "an average of 20 of 25 tokens over the layers is out"),
        (
            "uniform(keep=0.2) + fastv(layer=2, keep='layers:20')",
            "an average of 20 of 25 tokens over the layers is out",
        ),
    ],
)
def test_averages_that_an_image_cannot_have_are_refused_in_the_prefill(spec, message):
    with pytest.raises(Refusal, match=re.escape(message)):
        prefill(DEEP, prompts.batch(DEEP, "two-images"), spec)


# -- over the data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CURVES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_a_batch_keeps_what_its_own_run_keeps(name, method):
    samples = prompts.batch(name, "one-and-two")
    logits, together = prefill(name, samples, method)
    for row, sample in enumerate(samples):
        own, alone = prefill(name, [sample], method)
        assert [r.kept.tolist() for r in alone.last[0]] == [r.kept.tolist() for r in together.last[row]]
        assert torch.allclose(own[0, -1], logits[row, -1], atol=1e-4)


def test_images_keep_numbers_of_their_own_on_steps():
    name, samples = "qwen2.5-vl", prompts.batch("qwen2.5-vl", "one-and-two")
    _, sieve = prefill(name, samples, "divprune", keep="average:60%:gain:0.03")
    for decision in (r for row in sieve.last for r in row):
        least, most, step = bounds(0.6, decision.total)
        assert least <= decision.slots <= most
        assert decision.slots % step == 0 or decision.slots == most
    assert len({r.slots / r.total for row in sieve.last for r in row}) > 1


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("divprune(keep='average:8')", {}, "has no threshold yet: `tokensieve calibrate average` finds one"),
        ("divprune(keep='average:8:gain:0.1')", {"budget_scope": "sample"}, "is a budget of each image"),
        ("fastv(keep='average:8:gain:0.1')", {}, "is for methods that act in the connector; fastv acts in the decoder"),
        ("tome(keep='average:8:gain:0.1')", {}, "give it a number, as in tome(keep=0.5)"),
    ],
)
def test_what_has_no_average_over_the_data(spec, options, message):
    with pytest.raises(Refusal, match=re.escape(message)):
        tokensieve.attach(models.tiny_model(DEEP), spec, **options)


@pytest.mark.parametrize("keep", ["average:8:gain:0.1", "layers:8"])
def test_an_engine_must_know_the_number_before(keep):
    (method,) = parse("divprune", keep=keep)
    assert "worked out for each image once it is encoded, and vLLM reserves tokens before" in str(unserved(method))
    with pytest.raises(Refusal, match="a whole number of tokens >= 1, or a share"):
        with_keep([method], keep)
