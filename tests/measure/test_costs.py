"""Costs of a method, on a small model whose counts are known."""

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch

from tests.support.clocks import Clock, Cpu, Ticking
from tests.support.families import CORE
from tests.support.models import tiny_model
from tests.support.prompts import batch, collate
from tokensieve import Method, Reduction, VisualTokens, register
from tokensieve.errors import Refusal
from tokensieve.measure import Cost, measure_costs
from tokensieve.reference.model import build_model, build_processor

TEXT_LAYERS, WIDTH, TOTAL = 2, 32, 144
QUICK = {"repeats": 2, "warmup": 1, "decode_tokens": 2}
CLOCK = Clock()


@dataclass(frozen=True)
class Slow(Method):
    """Keeps the first tokens, which takes 150 ms."""

    keep: int = 16

    def reduce(self, image: VisualTokens) -> Reduction:
        CLOCK.spend(0.15)
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
    session = measure_costs(model, inputs, methods, **QUICK, clock=Ticking(), read=Cpu())
    return {cost.method: cost for cost in session}


@pytest.fixture
def timed(model, inputs):
    """``timed(methods, …)`` measures on a clock: a forward takes 1 ms for each row in the LLM, times ``drift(round)``.

    ``drift`` receives the seconds that have passed. The vision encoder takes no time.
    """
    handles = []

    def timed(methods, drift=lambda now: 1.0, models=(), **options):
        def spend(module, arguments, output):
            CLOCK.spend(1e-3 * arguments[0].shape[1] * drift(CLOCK.now))

        CLOCK.now = 0.0
        for host in {id(m): m for m in (model, *models)}.values():
            handles.append(host.model.language_model.layers[-1].register_forward_hook(spend))
        options = {"repeats": 10, "warmup": 1, "decode_tokens": 2, "read": Cpu()} | options
        return measure_costs(model, inputs, methods, models=models or None, clock=CLOCK, **options)

    yield timed
    for handle in handles:
        handle.remove()


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


def test_the_times_are_those_of_the_work(timed, inputs):
    full, uniform = timed(["uniform(keep=16)"])
    rows = inputs["input_ids"].shape[1]
    assert full.prefill_ms.median == pytest.approx(rows)
    assert uniform.prefill_ms.median == pytest.approx(rows - TOTAL + 16)
    assert uniform.prefill_speedup.median == pytest.approx(rows / (rows - TOTAL + 16))
    assert (full.decode_ms_per_token.median, uniform.decode_ms_per_token.median) == pytest.approx((1, 1))
    assert (uniform.break_even, uniform.break_even_tokens) == ("at once", 0)
    assert uniform.method_ms.median == pytest.approx(0)
    assert (full.timing_note, uniform.timing_note) == (None, None)


def test_a_slow_method_has_a_large_method_time(timed, registry):
    register("test-slow", paper="none")(Slow)
    full, slow = timed([Slow()])
    assert slow.method == "test-slow(keep=16)"
    assert slow.method_ms.median == pytest.approx(150)
    assert slow.prefill_ms.median == pytest.approx(150 + full.prefill_ms.median - TOTAL + 16)
    assert slow.prefill_speedup.high < 1
    assert slow.break_even == "never"  # each step of decoding takes as long as without it


@pytest.mark.parametrize("drift", [lambda now: 1 + now, lambda now: 1 / (1 + now), lambda now: 1 + int(now) % 3])
def test_rows_agree_on_a_machine_that_grows_slower_or_faster(timed, drift):
    """The unhooked model was once timed alone, before the methods: a slower row had a speedup above 1."""
    full, *rows = timed(["uniform(keep=16)", "pool(keep=36)", "random(keep=120)"], drift)
    for row in rows:
        for times, speedup in ((row.prefill_ms, row.prefill_speedup), (row.decode_ms_per_token, row.decode_speedup)):
            reference = full.prefill_ms if times is row.prefill_ms else full.decode_ms_per_token
            assert times.median * speedup.median == pytest.approx(reference.median)
            assert (times.median < reference.median) == (speedup.median > 1)


def test_every_candidate_runs_once_in_each_round(timed, model):
    order = []
    handle = model.model.language_model.layers[0].register_forward_hook(
        lambda module, arguments, output: order.append(arguments[0].shape[1])
    )
    try:
        full, *_ = timed(["uniform(keep=16)", "uniform(keep=36)"], repeats=4, warmup=0)
    finally:
        handle.remove()
    rows = order[0]
    small, large = rows - TOTAL + 16, rows - TOTAL + 36
    # each method is followed by its replay; the next round runs backwards
    a_round = [rows, small, small, large, large]
    decoding = [rows, 1, 1, small, 1, 1, large, 1, 1]
    backwards = [large, 1, 1, small, 1, 1, rows, 1, 1]
    assert order[-9 * 4 :] == (decoding + backwards) * 2
    assert order[-9 * 4 - 5 * 4 : -9 * 4] == (a_round + a_round[::-1]) * 2
    assert (full.prefill_ms.low, full.prefill_ms.high) == pytest.approx((rows, rows))


def test_a_second_model_is_paired_with_the_first(timed, model, inputs):
    tuned = deepcopy(model)
    half = tuned.model.language_model.layers[0].register_forward_hook(lambda *_: CLOCK.spend(0.5))
    full, same, other = timed(["uniform(keep=16)"] * 2, models=[model, tuned])
    half.remove()
    assert other.prefill_ms.median == pytest.approx(same.prefill_ms.median + 500)
    for row in (same, other):
        assert row.prefill_ms.median * row.prefill_speedup.median == pytest.approx(full.prefill_ms.median)
    assert (other.flops, other.flops_ratio) == (same.flops, same.flops_ratio)


def test_a_busy_machine_is_noted_on_every_row(timed, monkeypatch):
    monkeypatch.setattr("tokensieve.measure.costs.usable_cores", lambda: {0, 1})
    rows = timed(["uniform(keep=16)"], read=Cpu(others=1.5))
    assert {row.timing_note for row in rows} == {
        "the times are uncertain: other processes used 1.5 of 2 cores beside 1 thread of torch; "
        "measure again on a free machine"
    }


def test_throughput_and_requests_follow_from_the_times(timed):
    full, row = timed(["uniform(keep=16)"])
    assert full.prompts == 1
    assert full.prompts_per_second == pytest.approx(1e3 / full.prefill_ms.median)
    assert full.tokens_per_second == pytest.approx(1000)
    assert row.request_seconds(64).median == pytest.approx(row.prefill_ms.median + 64)
    assert row.request_seconds(0, requests=1).median == pytest.approx(row.prefill_ms.median / 1e3)


@pytest.mark.parametrize("options", [{"repeats": 0}, {"decode_tokens": 0}])
def test_no_round_is_refused(model, inputs, options):
    with pytest.raises(Refusal, match="must be at least 1"):
        measure_costs(model, inputs, [], **options)


def test_decisions_can_be_measured_as_they_are(timed):
    decision = Reduction(TOTAL, torch.arange(0, TOTAL, 9))
    _, replay = timed([[[decision]]])
    assert (replay.method, replay.tokens_after, replay.method_ms) == ("replay", 16, None)


def test_nothing_stays_attached(model, inputs, costs):
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_json_round_trip(costs):
    for cost in costs.values():
        assert Cost.from_json(cost.to_json()) == cost


@pytest.mark.parametrize("family", CORE)
def test_every_family_can_be_measured(family):
    samples = batch(family, "ragged")
    prompts = collate(family, samples)
    options = {**QUICK, "clock": Ticking(), "read": Cpu()}
    full, uniform = measure_costs(tiny_model(family), prompts, ["uniform(keep=4)"], **options)
    assert full.prompts == len(samples)
    before = [[image.tokens for image in sample.images] for sample in samples]
    assert full.tokens_before == sum(map(sum, before)) / sum(map(len, before))
    assert uniform.tokens_after == 4
    columns = prompts["input_ids"].shape[1]
    lengths = prompts["attention_mask"].sum(-1).tolist()
    width = max(n - sum(images) + 4 * len(images) for n, images in zip(lengths, before, strict=True))
    assert uniform.kv_bytes * columns == full.kv_bytes * width
    linear = 3 * 2 * (2 * 64 * 64 + 3 * 64 * 128)  # of a row in three layers, without keys, values and attention
    assert full.flops - uniform.flops > (columns - width) * len(samples) * linear


def test_the_representation_is_one_line_of_numbers(costs):
    cost = costs["random(keep=16)"]
    assert repr(cost) == (
        f"Cost(random(keep=16): 16 of {TOTAL} tokens, {cost.flops_ratio:.0%} of the FLOPs, "
        f"prefill {cost.prefill_ms} ms, {cost.prefill_speedup}× as fast as full, "
        f"{cost.decode_ms_per_token} ms per token)"
    )
