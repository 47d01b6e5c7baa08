"""Interleaved timing, on a clock that only the calls advance."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.support.clocks import Clock
from tokensieve.loading import devices_of
from tokensieve.measure import Spread, interleave, paired_ratio, ratio_digits, two_digits
from tokensieve.measure.latency import stopwatch


@pytest.fixture
def clock():
    return Clock()


def test_rounds_alternate_and_warmup_is_not_timed(clock):
    order = []

    def call(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            clock.spend(seconds if len(order) > 4 else 100)  # the first two rounds are cold

        return run

    a, b = interleave([call("a", 1), call("b", 3)], repeats=3, warmup=2, clock=clock)
    assert a == pytest.approx([1000] * 3)
    assert b == pytest.approx([3000] * 3)
    assert "".join(order) == "abbaabbaab"


def test_the_context_is_entered_each_time_and_not_timed(clock):
    inside = []

    @contextmanager
    def attached():
        clock.spend(50)
        inside.append(True)
        yield
        inside.pop()
        clock.spend(50)

    seen = []

    def call() -> None:
        seen.append(bool(inside))
        clock.spend(1)

    (times,) = interleave([call], around=[attached], repeats=2, warmup=0, clock=clock)
    assert times == pytest.approx([1000] * 2)
    assert seen == [True, True]
    assert not inside


def test_ratios_are_paired():
    slow, fast = [10.0, 100.0, 20.0], [5.0, 50.0, 5.0]  # round two hit a busy machine
    assert paired_ratio(slow, fast) == Spread(median=2.0, low=2.0, high=3.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (804.3, "800"), (13.82, "14"), (9.96, "10"), (0.996, "1.0"), (1.18, "1.2"), (0.0456, "0.046"), (0, "0"),
        (-8.34, "-8.3"), (12345, "12000"), (99.6, "100"), (1e-7, "0.00000010"),
    ],
)  # fmt: skip
def test_noisy_figures_have_two_digits(value, text):
    assert two_digits(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.183, "1.18"), (0.854, "0.85"), (12.3, "12.30"), (1.06, "1.06"), (1.004, "1.004"), (0.996, "0.996"),
        (0.994, "0.99"), (0.9996, "0.9996"), (1.0, "1.00"), (1.00001, "1.00"),
    ],
)  # fmt: skip
def test_a_ratio_shows_its_side_of_one(value, text):
    assert ratio_digits(value) == text


def test_a_spread_reads_as_a_median_with_its_quartiles():
    assert str(Spread(1.183, 1.1, 1.26)) == "1.2 (1.1–1.3)"
    assert str(Spread(1.06, 1.02, 1.14)) == "1.1 (1.02–1.1)"  # a speedup whose quartiles exclude 1


def test_every_gpu_that_a_model_lies_on_is_waited_for(clock, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    stopwatch(lambda: clock.spend(1), devices=["cuda:1", "cpu", "cuda:0"], clock=clock)()
    assert waited == ["cuda:1", "cuda:0"] * 2


def test_the_devices_of_a_model_are_those_of_its_weights_but_not_meta():
    class Model(nn.Sequential):
        device = torch.device("cpu")

        def get_input_embeddings(self) -> nn.Module:
            return self[0]

    model = Model(nn.Embedding(2, 2), nn.Linear(2, 2, device="meta"))
    assert devices_of(model) == [torch.device("cpu")]
