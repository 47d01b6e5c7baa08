"""What must hold for any numbers inside the tower: partitions, budgets, weights, orders, batches, dtypes."""

import dataclasses
import inspect
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.methods import inside_encoder
from tokensieve import list_methods, parse
from tokensieve.methods.registry import find
from tokensieve.tokens import EncoderTokens

FEW = settings(deadline=None, derandomize=True, database=None, max_examples=25)
BUDGETED = (
    "tome",
    "tome(official_order=True)",
    "tome(prop_attn=False)",
    "illava-encoder",
    "illava-encoder(favour_attended=True)",
)
SPECS = (*BUDGETED, "mustdrop-encoder(threshold=0.2)", "mustdrop-encoder(threshold=0.3, window=2)", "mustdrop-encoder")


def image(seed, grid, batch=1, dtype=torch.float32, specials=1):
    g, n = torch.Generator().manual_seed(seed), grid[0] * grid[1]
    rows = torch.randn(batch, n, 12, generator=g) + 0.7 * torch.randn(batch, 1, 12, generator=g)
    return EncoderTokens(
        rows.to(dtype),
        grid=grid,
        attention_received=torch.rand(batch, n, generator=g),
        encoder_keys=torch.randn(batch, n, 2, 4, generator=g).to(dtype),
        sizes=torch.randint(1, 5, (batch, n), generator=g).float(),
        specials=specials,
    )


def decide(spec, tokens, keep):
    method = parse(spec)[0]
    return (dataclasses.replace(method, keep=keep) if spec in BUDGETED else method)(tokens)


@pytest.mark.parametrize("spec", SPECS)
@FEW
@given(
    seed=st.integers(0, 10**6),
    grid=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    share=st.floats(0.5, 0.99),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    specials=st.integers(0, 2),
)
def test_every_token_goes_into_one_slot(spec, seed, grid, share, batch, dtype, specials):
    tokens = image(seed, grid, batch, dtype, specials)
    keep = max(-(-tokens.total // 2), min(tokens.total - 1, round(share * tokens.total)))
    decision = decide(spec, tokens, keep)
    assert decision.slots == keep or spec not in BUDGETED
    for i, one in enumerate(decision):
        matrix = one.matrix()
        assert sorted({*one.kept.tolist()}) == sorted(one.kept.tolist())
        assert bool(((matrix != 0).sum(0) == 1).all()), "nobody is dropped, nobody is in two slots"
        assert bool((matrix[torch.arange(one.slots), one.kept] > 0).all()), "each slot holds its own anchor"
        torch.testing.assert_close(matrix.sum(-1), torch.ones(one.slots))
        if spec.startswith("tome"):
            sizes = tokens.sizes[i]
            expected = (matrix != 0) * sizes / ((matrix != 0) * sizes).sum(-1, keepdim=True)
            torch.testing.assert_close(matrix, expected)
        alone = decide(spec, each(tokens, i), keep)[0]
        assert alone.kept.tolist() == one.kept.tolist()
        torch.testing.assert_close(alone.matrix(), matrix)
    assert decision.apply(tokens.features).dtype == dtype


def each(tokens, i):
    """One image of a batch, with its evidence."""
    rows = {name: getattr(tokens, name)[i : i + 1] for name in ("attention_received", "encoder_keys")}
    return dataclasses.replace(tokens, features=tokens.features[i : i + 1], sizes=tokens.sizes[i : i + 1], **rows)


@pytest.mark.parametrize("spec", ["tome", "illava-encoder"])
@FEW
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
def test_scores_scaled_by_a_positive_number_change_nothing(spec, seed, scale):
    tokens = image(seed, (5, 6))
    scaled = {name: getattr(tokens, name) * scale for name in ("attention_received", "encoder_keys")}
    a, b = (decide(spec, x, 20) for x in (tokens, dataclasses.replace(tokens, **scaled)))
    assert torch.equal(a.kept, b.kept)
    torch.testing.assert_close(a.matrix(), b.matrix())


@FEW
@given(
    total=st.integers(2, 800),
    stages=st.integers(1, 30),
    keep=st.integers(1, 800),
    inflection=st.floats(-1, 1),
)
def test_schedules_reach_their_budget_and_never_more_than_halve(total, stages, keep, inflection):
    method = parse(f"tome(keep={keep}, inflection={inflection!r})")[0]
    try:
        left = [total, *method.stage_budgets(total, range(stages), stages)]
    except ValueError:
        assert keep * 2**stages < total
        return
    assert left[-1] == min(keep, total)
    assert all(after <= before <= 2 * after for before, after in pairwise(left))


@FEW
@given(total=st.integers(1, 800), stages=st.integers(1, 30), share=st.floats(0.01, 1.0))
def test_the_same_number_leaves_at_each_stage(total, stages, share):
    method = parse(f"illava-encoder(keep={share!r})")[0]
    left = [total, *method.stage_budgets(total, range(stages), stages)]
    gone = [a - b for a, b in pairwise(left)]
    assert max(gone) - min(gone) <= 1
    assert left[-1] == max(1, round(share * total))


def layer_numbers(layers, depth):
    return dataclasses.replace(parse("illava-encoder")[0], layers=layers).layer_numbers(depth)


def test_layers():
    assert layer_numbers((0.2, 0.24, 0.28, 0.32), 26) == [5, 6, 7, 8], "as in the official code"
    assert layer_numbers((0.2, 0.24, 0.28, 0.32), 23) == [5, 6, 7, 8]
    assert layer_numbers((0.2, 0.24, 0.28, 0.32), 3) == [1, 2]
    assert layer_numbers((0, 5), 6) == [0, 5]
    for wrong in ((), (6,), (3, 3), (4, 2), (-1,)):
        with pytest.raises(ValueError, match="tokens can leave in layers 0 to 5 of this vision encoder"):
            layer_numbers(wrong, 6)


def test_method_files_are_short():
    methods = [find(info.name) for info in list_methods() if inside_encoder(info)]
    assert methods
    for method in methods:
        assert len(inspect.getsource(inspect.getmodule(method)).splitlines()) <= 80, method
