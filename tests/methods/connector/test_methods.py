"""Every registered method, on visual tokens made by hand."""

import dataclasses
import inspect

import pytest
import torch

import tokensieve
from tests.support.methods import VARIANTS, before_llm, connector_specs
from tests.support.oracle import area_matrix, largest_grid
from tokensieve.budget import count, parse_budget
from tokensieve.errors import Refusal
from tokensieve.tokens import ByLayer, ConnectorTokens, UserText, resolve_layers

GRID, DEPTH = (5, 6), 6
BUDGETED = [info.name for info in before_llm() if "keep" in info.parameters]
SINGLE = [  # a net comes from the engine: tests/engine/test_nets.py
    spec
    for spec in connector_specs()
    if " + " not in spec and not isinstance(tokensieve.parse(spec)[0], tokensieve.methods.TrainedMethod)
]
# the choice depends on content alone, whatever the order of the tokens
BY_CONTENT = [
    spec
    for spec in SINGLE
    if tokensieve.parse(spec)[0].by_score or spec.startswith(("cls-knee", "divprune", "mustdrop-keys"))
]


def tokens(batch=3, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    n = GRID[0] * GRID[1]
    rows = {layer: torch.rand(batch, n, generator=g).softmax(-1) for layer in range(DEPTH)}
    text, mask = torch.randn(batch, 4, 8, generator=g), torch.ones(batch, 4, dtype=torch.bool)
    mask[-1, 2:] = False
    features = torch.randn(batch, n, 8, generator=g)
    similar = torch.rand(batch, n, generator=g)
    return ConnectorTokens(
        features.to(dtype),
        grid=GRID,
        cls_attention=ByLayer(rows, DEPTH),
        cls_similarity=similar,
        patches=torch.randn(batch, n, 12, generator=g).to(dtype),
        pixel_hash=torch.arange(batch),
        user_text=UserText(text.to(dtype), mask),
    )


def changed(given, change, **fields):
    """The same tokens with other ``fields``, and ``change`` applied to everything that is a value per token."""
    rows = ByLayer({layer: change(row) for layer, row in given.cls_attention.items()}, DEPTH)
    return dataclasses.replace(given, cls_attention=rows, cls_similarity=change(given.cls_similarity), **fields)


def pick(given, images):
    text = UserText(given.user_text.features[images], given.user_text.mask[images])
    fields = {name: getattr(given, name)[images] for name in ("features", "patches", "pixel_hash")} | {
        "user_text": text
    }
    return changed(given, lambda row: row[images], **fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SINGLE)
def test_a_batch_is_decided_image_by_image(spec, dtype):
    (method,), given = tokensieve.parse(spec), tokens(dtype=dtype)
    together = method(given)
    for i in range(3):
        alone = method(pick(given, [i]))[0]
        assert torch.equal(together[i].kept, alone.kept)
        assert torch.equal(together[i].matrix(), alone.matrix())
        assert together[i].apply(given.features[i]).dtype == dtype
        assert bool((together[i].kept.diff() > 0).all())
    assert together.grid == GRID


@pytest.mark.parametrize("spec", BY_CONTENT)
def test_content_decides_not_place(spec):
    (method,), given = tokensieve.parse(spec), tokens(batch=1)
    order = torch.randperm(given.total, generator=torch.Generator().manual_seed(1))
    moved = changed(given, lambda row: row[:, order], features=given.features[:, order])
    assert torch.equal(order[method(moved).kept[0]].sort().values, method(given).kept[0])


@pytest.mark.parametrize("spec", BY_CONTENT)
def test_scores_have_no_unit(spec):
    (method,), given = tokensieve.parse(spec), tokens()
    scaled = changed(given, lambda row: row * 4, features=given.features * 4)
    assert torch.equal(method(scaled).kept, method(given).kept)


@pytest.mark.parametrize("first_layer", [0, 2, -2])
@pytest.mark.parametrize("over", ["sum", "mean", "max", "min"])
def test_vtc_cls_by_hand(first_layer, over):
    given = tokens()
    rows = torch.stack([given.cls_attention[i] for i in range(DEPTH)][first_layer:-1])
    scores = {"sum": rows.sum(0), "mean": rows.mean(0), "max": rows.amax(0), "min": rows.amin(0)}[over]
    (method,) = tokensieve.parse(f"vtc-cls(keep=7, first_layer={first_layer}, over_layers={over!r})")
    reduction = method(given)
    torch.testing.assert_close(reduction.scores, scores)
    assert torch.equal(reduction.kept, scores.topk(7).indices.sort().values)


@pytest.mark.parametrize("name", ["pool", "downsample"])
@pytest.mark.parametrize("keep", [1, 7, 13, 0.5])
def test_pooling_by_hand(name, keep):
    (method,), given = tokensieve.parse(name, keep=keep), tokens()
    cells = largest_grid(GRID, count(keep, given.total))
    reduction = method(given)
    for matrix in reduction.matrix():
        torch.testing.assert_close(matrix, area_matrix(GRID, cells), atol=1e-6, rtol=0)
    centres = [[(2 * i + 1) * size // (2 * n) for i in range(n)] for size, n in zip(GRID, cells, strict=True)]
    assert reduction.kept[0].tolist() == [y * GRID[1] + x for y in centres[0] for x in centres[1]]


def test_random_differs_by_seed_and_by_image():
    given = tokens(batch=3)
    one, again, other = (tokensieve.parse(f"random(keep=9, seed={s})")[0](given).kept for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert len({tuple(kept) for kept in [*one.tolist(), *other.tolist()]}) == 6


@pytest.mark.parametrize("keep", [30, 31, 10**9, 1.0, 0.99])
@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_of_all_tokens_keeps_the_image_whole_with_a_note(name, keep):
    (method,) = tokensieve.parse(name, keep=keep)
    reduction = method(tokens())
    assert reduction.whole
    assert f"kept whole: the budget of {method} covers all of its 30 tokens" in reduction.notes


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, -0.5, True, None, "64", float("nan"), float("inf")])
@pytest.mark.parametrize("name", BUDGETED)
def test_invalid_budgets_are_refused(name, keep):
    with pytest.raises(ValueError, match=r"keep must be a whole number of tokens >= 1, or a share in \(0, 1\]; got "):
        tokensieve.parse(name, keep=keep)


@pytest.mark.parametrize(
    ("keep", "hint"),
    [("25%", "; write keep=0.25, without quotes"), ("64", "; write keep=64, without quotes"), ("many", "")],
)
def test_a_budget_in_quotes_is_shown_as_a_number(keep, hint):
    with pytest.raises(tokensieve.Refusal) as refused:
        tokensieve.parse("vtc-cls", keep=keep)
    assert str(refused.value).endswith(f"got {keep!r}{hint}")


@pytest.mark.parametrize(("keep", "total", "left"), [(5, 9, 5), (9, 5, 5), (0.5, 9, 4), (0.001, 9, 1), (1.0, 9, 9)])
def test_count(keep, total, left):
    assert count(keep, total) == left


@pytest.mark.parametrize(("text", "keep"), [("64", 64), ("0.25", 0.25), ("1.0", 1.0), ("25%", 0.25), ("1e-1", 0.1)])
def test_parse_budget(text, keep):
    assert parse_budget(text) == keep
    assert type(parse_budget(text)) is type(keep)


@pytest.mark.parametrize("text", ["", "many", "0", "1.5", "200%", "nan", "inf", "-3", "%"])
def test_invalid_budgets_as_text_are_refused(text):
    with pytest.raises(ValueError, match="keep must be a whole number of tokens") as refused:
        parse_budget(text)
    assert str(refused.value).endswith((f"got {text}", f"got {text!r}"))  # as typed, not the share that it stands for


def test_pool_without_a_grid():
    given = ConnectorTokens(torch.randn(1, 6, 2))
    with pytest.raises(ValueError, match="pool needs tokens on a grid; these 6 tokens have none"):
        tokensieve.parse("pool(keep=2)")[0](given)


@pytest.mark.parametrize("info", before_llm(), ids=lambda i: i.name)
def test_the_public_record(info):
    (method,) = tokensieve.parse(info.name)
    assert info.title.endswith(".")
    assert info.paper in ("baseline", "this project") or info.paper.startswith("arXiv:")
    assert info.parameters == {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    assert "__init__" not in type(method).__qualname__
    assert len(inspect.getsource(inspect.getmodule(type(method))).splitlines()) <= 110
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.keep = 3


@pytest.mark.parametrize("spec", VARIANTS)
def test_specs_read_back(spec):
    stages = tokensieve.parse(spec)
    assert tokensieve.parse(" + ".join(map(str, stages))) == stages


@pytest.mark.parametrize(
    ("layer", "number"), [(0.35, 8), (0.2, 5), (0.0, 0), (1.0, 23), (-2, 22), ((0.2, -2), [5, 22])]
)
def test_a_float_is_a_share_of_the_encoders_depth(layer, number):
    numbers = number if isinstance(number, list) else [number]
    assert resolve_layers(layer, 24) == numbers
    if not isinstance(layer, tuple):
        rows = torch.rand(1, 30)
        assert torch.equal(ByLayer({number: rows}, 24)[layer], rows)


@pytest.mark.parametrize("layer", [24, -25, 1.5])
def test_a_layer_that_the_encoder_lacks_is_refused(layer):
    with pytest.raises(Refusal, match=f"the encoder has layers 0 to 23; got {layer}"):
        resolve_layers(layer, 24)
