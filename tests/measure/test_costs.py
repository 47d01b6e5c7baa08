"""Costs of a method, on a small model whose counts are known."""

import time
from dataclasses import dataclass

import pytest
import torch

from tests.support.families import CORE
from tests.support.models import tiny_model
from tests.support.prompts import batch, collate
from tokensieve import Method, Reduction, VisualTokens, register
from tokensieve.measure import Cost, measure_costs
from tokensieve.measure.costs import break_even
from tokensieve.reference.model import build_model, build_processor

TEXT_LAYERS, WIDTH, TOTAL = 2, 32, 144
QUICK = {"repeats": 2, "warmup": 1, "decode_tokens": 2}


@dataclass(frozen=True)
class Slow(Method):
    """Keeps the first tokens, after a nap."""

    keep: int = 16

    def reduce(self, image: VisualTokens) -> Reduction:
        time.sleep(0.15)
        return image.keep(torch.arange(self.keep).expand(len(image.features), -1))


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return build_model(width=WIDTH, vision_layers=3, text_layers=TEXT_LAYERS).eval()


@pytest.fixture(scope="module")
def inputs():
    ids = build_processor().tokenizer(["USER: " + "<image>" * TOTAL + " what is it? ASSISTANT:"], return_tensors="pt")
    torch.manual_seed(0)
    return {**ids, "pixel_values": torch.randn(1, 3, 120, 120)}


@pytest.fixture(scope="module")
def costs(model, inputs):
    methods = ["random(keep=16)", "downsample(keep=16)", "pool(keep=0.25)"]
    return {cost.method: cost for cost in measure_costs(model, inputs, methods, **QUICK)}


def test_full_comes_first_and_is_the_reference(costs):
    name, full = next(iter(costs.items()))
    assert name == "full"
    assert (full.tokens_before, full.tokens_after, full.flops_ratio) == (TOTAL, TOTAL, 1)
    assert full.prefill_speedup.median == 1
    assert full.method_ms is None


def test_counts_fall_as_the_tokens_do(costs, inputs):
    full, random = costs["full"], costs["random(keep=16)"]
    prompt = inputs["input_ids"].shape[1]
    per_token = 2 * TEXT_LAYERS * WIDTH * 4  # keys and values, float32
    assert full.kv_bytes == prompt * per_token
    assert random.kv_bytes == (prompt - TOTAL + 16) * per_token
    per_row = TEXT_LAYERS * 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * 3 * WIDTH)
    quadratic = TEXT_LAYERS * 4 * WIDTH * (prompt**2 - (prompt - TOTAL + 16) ** 2)
    assert full.flops - random.flops == (TOTAL - 16) * per_row + quadratic
    assert random.flops_ratio == random.flops / full.flops
    assert random.peak_activation_bytes < full.peak_activation_bytes


def test_a_method_in_the_vision_encoder_saves_there_and_has_no_replay(costs):
    assert costs["downsample(keep=16)"].flops < costs["random(keep=16)"].flops
    assert costs["downsample(keep=16)"].method_ms is None
    assert costs["pool(keep=0.25)"].method_ms is not None
    assert costs["pool(keep=0.25)"].tokens_after == 36


def test_a_slow_method_has_a_large_method_time(model, inputs, registry):
    register("test-slow", paper="none")(Slow)
    _, slow = measure_costs(model, inputs, [Slow()], **QUICK)
    assert slow.method == "test-slow(keep=16)"
    assert slow.method_ms is not None
    assert slow.method_ms.median > 100
    assert slow.prefill_ms.median > 150
    assert slow.prefill_speedup.median < 1
    assert slow.break_even_tokens is None or slow.break_even_tokens > 0


def test_decisions_can_be_measured_as_they_are(model, inputs):
    decision = Reduction(TOTAL, torch.arange(0, TOTAL, 9))
    _, replay = measure_costs(model, inputs, [[[decision]]], **QUICK)
    assert (replay.method, replay.tokens_after, replay.method_ms) == ("replay", 16, None)


def test_nothing_stays_attached(model, inputs, costs):
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_break_even():
    assert break_even(-3.0, 1.0) == 0
    assert break_even(6.0, 2.0) == 3
    assert break_even(6.0, 0.0) is None


def test_json_round_trip(costs):
    for cost in costs.values():
        assert Cost.from_json(cost.to_json()) == cost


@pytest.mark.parametrize("family", CORE)
def test_every_family_can_be_measured(family):
    samples = batch(family, "ragged")
    prompts = collate(family, samples)
    full, uniform = measure_costs(tiny_model(family), prompts, ["uniform(keep=4)"], **QUICK)
    before = [[image.tokens for image in sample.images] for sample in samples]
    assert full.tokens_before == sum(map(sum, before)) / sum(map(len, before))
    assert uniform.tokens_after == 4
    columns = prompts["input_ids"].shape[1]
    lengths = prompts["attention_mask"].sum(-1).tolist()
    width = max(n - sum(images) + 4 * len(images) for n, images in zip(lengths, before, strict=True))
    assert uniform.kv_bytes * columns == full.kv_bytes * width
    linear = 3 * 2 * (2 * 64 * 64 + 3 * 64 * 128)  # of a row in three layers, without keys, values and attention
    assert full.flops - uniform.flops > (columns - width) * len(samples) * linear
