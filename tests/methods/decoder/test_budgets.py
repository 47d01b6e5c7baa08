"""Both conventions of a budget, turned into counts per stage."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

import tokensieve
from tests.support import families, models, prompts
from tokensieve import Reduction, parse
from tokensieve.budget import stage_counts
from tokensieve.measure import count_flops
from tokensieve.methods import DecoderMethod
from tokensieve.tokens import DecoderTokens, DecoderUserText


def per_stage(method, entered, depth):
    return method.stage_budgets(entered, method.layer_numbers(depth), depth)


@pytest.mark.parametrize(("average", "kept"), [(192, 166), (128, 98), (64, 30)])
def test_published_averages_of_fastv(average, kept):
    (method,) = parse(f"fastv(layer=2, average={average})")
    assert per_stage(method, 576, 32) == [kept]


def test_autoprune_leaves_an_image_of_one_token():
    """A third of one token is one token, as for every other method; of two, all pass the first layers."""
    (method,) = parse("autoprune(keep=0.333)")
    assert per_stage(method, 1, 32) == [1] * 30
    with pytest.raises(tokensieve.Refusal, match=r"reachable: above 1\.06"):
        per_stage(method, 2, 32)


def test_published_counts():
    assert per_stage(parse("pyramiddrop")[0], 576, 32) == [288, 144, 72]
    assert per_stage(parse("sparsevlm(counts=(300, 200, 110))")[0], 576, 32) == [300, 200, 110]
    assert parse("sparsevlm")[0].layer_numbers(32) == parse("sparsevlm+")[0].layer_numbers(32) == [3, 7, 16]
    assert parse("pyramiddrop")[0].layer_numbers(32) == [8, 16, 24]


@pytest.mark.parametrize(("gamma", "keep"), [(0.0, 64), (0.2, 192), (10.0, 0.25)])
def test_autoprune_has_its_average_whatever_the_slope(gamma, keep):
    """The curve adapts to the image; its area does not."""
    (method,) = parse(f"autoprune(keep={keep}, gamma={gamma}, recycle=0.0)")
    attention = torch.rand(2, 4, 9, 576, generator=torch.Generator().manual_seed(0)) / 900
    attention[0] *= 4 * torch.eye(9, 576).add(0.01)  # the first image has much information
    words = DecoderUserText(torch.zeros(2, 9, 1), torch.ones(2, 9, dtype=torch.bool))
    image = DecoderTokens(torch.zeros(2, 576, 1), attention=attention, user_text=words)
    for numbers in method.schedule(image, method.layer_numbers(32), 32):
        average = (2 * 576 + sum(numbers)) / 32
        assert abs(average - (keep if isinstance(keep, int) else keep * 576)) <= 0.5
        assert numbers == sorted(numbers, reverse=True)


def test_pyramiddrop_cannot_go_below_its_first_stage():
    (method,) = parse("pyramiddrop(average=144)")
    with pytest.raises(ValueError, match="reachable: above 144, up to 576"):
        per_stage(method, 576, 32)


@pytest.mark.parametrize("average", [150, 200, 300, 0.5, 0.9])
@pytest.mark.parametrize("blocks", [[8, 16, 24], [2], [3, 7, 16]])
def test_an_average_is_met_within_rounding(blocks, average):
    counts = stage_counts(576, 32, blocks, 1, average)
    seen = [576] * blocks[0]
    for count, start, end in zip(counts, blocks, [*blocks[1:], 32], strict=True):
        seen += [count] * (end - start)
    wanted = average if isinstance(average, int) else average * 576
    assert abs(sum(seen) / 32 - wanted) <= 0.5
    assert counts == sorted(counts, reverse=True)


def test_an_image_that_does_not_exceed_an_average_stays_whole():
    assert per_stage(parse("fastv(average=64)")[0], 40, 32) == [40]
    assert per_stage(parse("fastv(keep=64)")[0], 40, 32) == [40]


def test_shares_of_the_depth_in_shallow_models():
    assert parse("sparsevlm")[0].layer_numbers(6) == [1, 2, 3]
    assert parse("pyramiddrop")[0].layer_numbers(4) == [1, 2, 3]


@pytest.mark.parametrize("family", families.DEEP)
def test_averages_are_the_mean_over_the_layers(family):
    """Law 6: tokens per layer and columns in the cache follow from the budget."""
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    with tokensieve.attach(model, "pyramiddrop(layers=(1, 2, 4), average=0.5)") as sieve:
        out = model.generate(**inputs, max_new_tokens=1, **prompts.GREEDY)
    ((seen,),), total = sieve.tokens, sieve.last[0][0].total
    assert abs(sum(seen) / families.DEPTH - total / 2) <= 0.5
    text = inputs["input_ids"].shape[1] - total
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == [text + n for n in seen]


def test_a_decoder_method_written_like_a_connector_method_meets_its_average(registry):
    @dataclass(frozen=True)
    class First(DecoderMethod):
        keep: float = 0.25
        average: float | None = None
        layers: tuple[int, ...] = (2, 4)

        def reduce(self, image: DecoderTokens) -> Reduction:
            return image.keep(torch.arange(image.budget).expand(len(image.features), -1))

    registry.register("first", paper="none", stage="decoder")(First)
    name = families.DEEP[0]
    model, inputs = models.tiny_model(name), prompts.collate(name, [prompts.sample(name, (3, 6), (0,), 1)])
    for spec in ("first(average=0.5)", "pyramiddrop(layers=(2, 4), average=0.5)"):
        with torch.no_grad(), tokensieve.attach(model, spec) as sieve:
            model(**inputs)
        ((tokens,),) = sieve.tokens
        assert sum(tokens) / len(tokens) == pytest.approx(tokens[0] / 2, abs=0.5), spec
        assert tokens[0] > tokens[2] > tokens[4], spec


def test_no_attention_matrix_is_made():
    """Law 6: the probed block asks for one row, all others keep their kernel: nothing of [L, L] exists."""
    family = "llava-clip-deep"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    length, shapes = inputs["input_ids"].shape[1], set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    shapes.add((func.__name__, tuple(tensor.shape[-2:])))
            return out

    with tokensieve.attach(model, "pyramiddrop(keep=0.2)"), torch.no_grad(), Watch():
        model(**inputs)
    assert not [shape for shape in shapes if shape[1] == (length, length)]


def test_flops_are_those_of_the_short_sequence_and_one_row():
    """Law 6: a score costs one row of attention, and nothing else that a method without scores does not need."""
    family = "llava-clip-deep"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    config, length = model.config.text_config, inputs["input_ids"].shape[1]

    def flops(spec):
        with tokensieve.attach(model, spec), torch.no_grad():
            return count_flops(lambda: model(**inputs))

    assert flops("fastv(layer=2, keep=5)") - flops("pool-decoder(layer=2, stride=5)") == 2 * config.hidden_size * length
    blocks = [flops(f"vtw(layer={layer})") for layer in range(1, families.DEPTH)]
    steps = [later - earlier for earlier, later in pairwise(blocks)]
    assert min(steps) > 0
    assert len(set(steps)) == 1, "every block more costs the same"
