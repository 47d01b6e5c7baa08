"""A serving engine reserves placeholders before it encodes: the promised number must be what the method makes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokensieve import list_methods
from tokensieve.methods import Method, Needs, parse
from tokensieve.tokens import ByLayer, ConnectorTokens, UserText
from tokensieve.vllm.settings import unserved

DEPTH, WIDTH = 4, 8


def served() -> list[str]:
    """Return the methods that an engine can run with a budget."""
    names = [info.name for info in list_methods() if info.stage == "connector" and "keep" in info.parameters]
    return [name for name in names if unserved(parse(f"{name}(keep=4)")[0]) is None]


def tokens(needs: Needs, grid: tuple[int, int], seed: int) -> ConnectorTokens:
    """Return two images with all evidence; some rows are equal, as those of a plain background are."""
    height, width = grid
    total, draw = height * width, torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> torch.Tensor:
        values = torch.rand(2, total, *shape, generator=draw)
        return values.where(torch.rand(2, total, *[1] * len(shape), generator=draw) > 0.3, values[:, :1])

    def by_layer(*shape: int) -> ByLayer:
        return ByLayer({layer: rows(*shape) for layer in range(DEPTH)}, DEPTH)

    text = UserText(torch.randn(2, 3, WIDTH, generator=draw), torch.tensor([[True] * 3, [True, True, False]]))
    return ConnectorTokens(
        rows(WIDTH),
        grid=grid,
        cls_attention=by_layer(),
        cls_attention_single_head=by_layer(),
        attention_received=by_layer(),
        encoder_keys=by_layer(2, 4),
        patches=rows(WIDTH),
        project=torch.tanh,
        pixel_hash=torch.randint(1 << 40, (2,), generator=draw),
        user_text=text,
    )


@pytest.mark.parametrize("name", served())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(height=st.integers(1, 12), width=st.integers(1, 12), share=st.floats(0.01, 1), seed=st.integers(0, 9999))
def test_a_method_makes_the_slots_that_it_promises(name, height, width, share, seed):
    budget = max(1, round(share * height * width))
    method: Method = parse(f"{name}(keep={budget})")[0]
    decision = method(tokens(method.needs, (height, width), seed))
    promised = height * width if budget == height * width else method.slots(budget, (height, width))
    assert [one.slots for one in decision] == [promised] * 2


def test_enough_methods_are_served():
    assert len(served()) >= 19, "a change of a method's needs has taken it away from the engines"


def test_a_method_without_a_budget_promises_nothing():
    assert parse("setok-cluster")[0].slots(4, (4, 4)) is None
    assert parse("pool(keep=5)")[0].slots(5, (4, 4)) == 4
    assert parse("pool(keep=5)")[0].slots(5, None) is None


@pytest.mark.parametrize(
    "spec", ["hired(keep=4, spatial=3)", "hired(keep=4, official_tiles=True)", "holov(keep=4, overflow='truncate')"]
)
def test_parameters_that_let_the_content_decide_promise_nothing(spec):
    (method,) = parse(spec)
    assert method.slots(4, (4, 4)) is None
    assert "decides by the image's content" in unserved(method)
