"""Properties that hold for any numbers: budgets, order, permutations, weights, scales, dtypes and batches."""

import dataclasses
import inspect

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.support.methods import FIRST_TUNED
from tokensieve import parse
from tokensieve.methods import mmtok, par, scope
from tokensieve.methods.registry import find
from tokensieve.ops import cluster, dpp_map, greedy, merge, normalise, score, select
from tokensieve.tokens import ByLayer, ConnectorTokens, UserText

WIDTH, HEADS, WORDS = 24, 2, 3
FEW = settings(deadline=None, derandomize=True, database=None)
FIXED = (
    "visionzip",
    "visionzip(combine='mean', contextual=0.5)",
    "prumerge",
    "prumerge+",
    "vispruner",
    "vispruner(step=1, important=0.2)",
    "hired",
    "fopru",
    "fopru(select='row')",
    "cdpruner",
    "scope",
    "scope(combine='plus', alpha=0.5)",
    "mmtok",
    "holov(windows=5)",
    "par(threshold=0.2)",
    "fastervlm",
    "vtc-cls",
    "divprune",
    "trsm",
    "simignore",
    "uniform",
    "random",
)
PRUNING = tuple(s for s in FIXED if not s.startswith(("visionzip", "prumerge", "par")))
# the place of a token counts in the others: strides, windows, rows, even and odd places
EQUIVARIANT = ("fastervlm", "vtc-cls", "divprune", "trsm", "simignore", "cdpruner", "scope", "mmtok", "vispruner")
EQUIVARIANT += ("fopru", "hired", "prumerge")
SCORED = ("fastervlm", "vtc-cls", "vispruner", "hired", "fopru", "fopru(select='row')", "scope", "visionzip", "holov")
SCORED += ("prumerge", "prumerge+")
COSINE = ("divprune", "cdpruner", "scope", "mmtok", "trsm", "simignore", "vispruner")  # directions count, not lengths
ADAPTIVE = ("prumerge", "prumerge+", "setok-cluster(threshold=0.8)", "prumerge+(top=2, stride=3)")


def image(seed, n=(4, 6), batch=1, dtype=torch.float32):
    """Random evidence of every kind for B images of h x w tokens."""
    g, (h, w) = torch.Generator().manual_seed(seed), n
    total = h * w

    def rows(*shape):
        return torch.randn(batch, total, *shape, generator=g).to(dtype)

    def attention():
        return torch.randn(batch, total, generator=g).mul(2).softmax(-1)

    return ConnectorTokens(
        rows(WIDTH),
        grid=n,
        cls_attention=ByLayer({0: attention(), 1: attention()}, 3),
        cls_attention_single_head=ByLayer({2: attention()}, 3),
        attention_received=ByLayer({1: attention()}, 3),
        encoder_keys=ByLayer({1: rows(HEADS, 8), 2: rows(HEADS, 8)}, 3),
        patches=rows(WIDTH + 1),
        pixel_hash=torch.randint(2**62, (batch,), generator=g),
        user_text=user_text(torch.randn(batch, WORDS, WIDTH, generator=g).to(dtype)),
    )


def user_text(rows):
    return UserText(rows, torch.ones(rows.shape[:2], dtype=torch.bool))


def mapped(tokens, change, **more):
    """The same evidence with ``change`` done to every tensor that has a row per token."""
    per_token = {"features": change(tokens.features), "patches": change(tokens.patches)}
    for name in ("cls_attention", "cls_attention_single_head", "attention_received", "encoder_keys"):
        per_token[name] = ByLayer({layer: change(x) for layer, x in getattr(tokens, name).items()}, 3)
    return dataclasses.replace(tokens, **per_token, **more)


def method(spec, **parameters):
    return parse(spec, **parameters)[0]


@pytest.mark.parametrize("spec", FIXED)
@settings(FEW, max_examples=8)
@example(seed=0, grid=(7, 9), share=0.75, batch=1, dtype=torch.bfloat16)  # more tokens than dimensions
@given(
    seed=st.integers(0, 10**6),
    grid=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    share=st.floats(0.01, 0.99),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_budget_order_and_range(spec, seed, grid, share, batch, dtype):
    tokens = image(seed, grid, batch, dtype)
    keep = max(1, min(tokens.total - 1, round(share * tokens.total)))
    reduction = method(spec, keep=keep)(tokens)
    assert reduction.slots == keep
    for one in reduction:
        assert bool((one.kept.diff() > 0).all())
        assert 0 <= int(one.kept[0]) <= int(one.kept[-1]) < tokens.total
    out = reduction.apply(tokens.features)
    assert out.shape == (batch, keep, WIDTH)
    assert out.dtype == dtype
    torch.testing.assert_close(
        reduction.matrix() @ tokens.features.float(),
        out.float(),
        atol=2e-2 if dtype != torch.float32 else 1e-5,
        rtol=2e-2,
    )
    if spec in PRUNING:
        assert reduction.mixing is None


@pytest.mark.parametrize("spec", FIXED)
def test_a_batch_is_its_images(spec):
    tokens, chosen = image(3, batch=3), method(spec, keep=7)
    together = chosen(tokens)
    for i in range(3):
        alone = chosen(one_of(tokens, i))
        assert together[i].kept.tolist() == alone[0].kept.tolist()
        torch.testing.assert_close(together[i].matrix(), alone[0].matrix())


@pytest.mark.parametrize("spec", ADAPTIVE)
@settings(FEW, max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_adaptive_images_do_not_mind_each_other(spec, seed):
    tokens, chosen = image(seed, (5, 7), batch=3), method(spec)
    together = chosen(tokens)
    for i, one in enumerate(together):
        alone = chosen(one_of(tokens, i))[0]
        assert one.valid is None
        assert one.kept.tolist() == alone.kept.tolist()
        assert bool((one.kept.diff() > 0).all())
        torch.testing.assert_close(one.matrix(), alone.matrix())
        assert torch.equal((one.matrix() != 0).sum(-1), one.counts)
    valid = torch.ones_like(together.anchors, dtype=torch.bool) if together.valid is None else together.valid
    assert torch.equal(together.weight_sums != 0, valid)


def one_of(tokens, i):
    text = user_text(tokens.user_text.features[i : i + 1])
    return mapped(tokens, lambda x: x[i : i + 1], user_text=text, pixel_hash=tokens.pixel_hash[i : i + 1])


def starts_with_a_tie(rows):
    """Whether the two rows farthest from all others are each other's nearest: DivPrune starts at the first of them."""
    cosine = torch.cosine_similarity(rows[:, None], rows, dim=-1).fill_diagonal_(-1)
    farthest, second = (1 - cosine.amax(-1)).topk(2).values
    return farthest - second < 1e-5


@pytest.mark.parametrize("spec", EQUIVARIANT)
@settings(FEW, max_examples=8)
@given(seed=st.integers(0, 10**6))
@example(seed=1400)  # starts with a tie
def test_permuted_tokens_permuted_choice(spec, seed):
    tokens, order = image(seed), torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    assume(spec != "divprune" or not starts_with_a_tie(tokens.features[0]))
    plain = method(spec, keep=8)(tokens)[0]
    permuted = method(spec, keep=8)(mapped(tokens, lambda x: x[:, order]))[0]
    assert sorted(order[permuted.kept].tolist()) == plain.kept.tolist()
    by_token = plain.matrix().index_select(1, order)
    places = [order[k].item() for k in permuted.kept]
    torch.testing.assert_close(permuted.matrix(), by_token[[plain.kept.tolist().index(p) for p in places]])


@pytest.mark.parametrize("spec", SCORED)
@settings(FEW, max_examples=8)
@given(seed=st.integers(0, 10**6), factor=st.sampled_from([0.25, 2.0, 64.0]))
def test_scaled_scores_choose_the_same(spec, seed, factor):
    tokens = image(seed)
    names = ("cls_attention", "cls_attention_single_head", "attention_received")
    scaled = dataclasses.replace(
        tokens, **{n: ByLayer({layer: x * factor for layer, x in getattr(tokens, n).items()}, 3) for n in names}
    )
    assert method(spec, keep=9)(tokens).kept.tolist() == method(spec, keep=9)(scaled).kept.tolist()


@pytest.mark.parametrize("spec", COSINE)
@settings(FEW, max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_longer_tokens_choose_the_same(spec, seed):
    """Each token scaled by a power of two of its own: exact in floating point."""
    tokens = image(seed)
    lengths = 2.0 ** torch.randint(-3, 4, (1, 24, 1), generator=torch.Generator().manual_seed(seed))
    scaled = dataclasses.replace(tokens, features=tokens.features * lengths, patches=tokens.patches * lengths)
    assert method(spec, keep=9)(tokens).kept.tolist() == method(spec, keep=9)(scaled).kept.tolist()


@settings(FEW, max_examples=8)
@given(seed=st.integers(0, 10**6), keep=st.integers(1, 23))
def test_merge_weights_are_conserved(seed, keep):
    tokens = image(seed, batch=2)
    everything = torch.ones(2, 24)
    for spec in ("visionzip(combine='mean', contextual=0.5)", "setok-cluster(threshold=0.8)", "par(threshold=0.2)"):
        reduction = method(spec, keep=keep)(tokens) if "setok" not in spec else method(spec)(tokens)
        valid = torch.ones_like(reduction.anchors) if reduction.valid is None else reduction.valid
        torch.testing.assert_close(reduction.weight_sums, valid.float())
        if keep > 1 and not spec.startswith("par"):  # nothing is dropped
            assert torch.equal((reduction.matrix() != 0).sum(1).float(), everything)
    attention = tokens.cls_attention_single_head[2]
    merged = method("prumerge", keep=keep, neighbours=3)(tokens)
    if keep > 1:
        matrix, which = merged.matrix(), torch.arange(2)
        leftover = (
            matrix.take_along_dim(merged.kept[..., None], -1).squeeze(-1).argmin(-1)
        )  # the others hold themselves
        dropped = torch.ones(2, 24).scatter(1, merged.kept, 0.0)
        dropped[which, merged.kept[which, leftover]] = 1
        torch.testing.assert_close(matrix[which, leftover], attention * dropped)
    assert bool((merged.matrix() >= 0).all())


def test_ties_go_to_the_lower_index():
    tokens = mapped(image(0), torch.ones_like)
    for spec in ("fastervlm", "vtc-cls", "hired", "fopru", "simignore", "trsm", "divprune", "scope", "mmtok"):
        assert method(spec, keep=4)(tokens).kept.tolist() == [[0, 1, 2, 3]], spec
    for spec in ("cdpruner", "vispruner", "holov", "prumerge", "par"):
        first, second = (method(spec, keep=4)(tokens) for _ in range(2))
        assert first.kept.tolist() == second.kept.tolist(), spec
        assert first.slots == 4


def test_duplicates_do_not_break_the_greedy_ones():
    tokens = mapped(image(1), lambda x: x[:, :3].repeat_interleave(8, 1))
    for spec in ("divprune", "cdpruner", "scope", "mmtok", "vispruner"):
        for keep in (3, 12, 23):
            kept = method(spec, keep=keep)(tokens).kept[0]
            assert len(kept.unique()) == keep, spec
            if spec == "divprune":
                assert len((kept // 8).unique()) == 3, "each group of equals is there before any twice"


def test_more_tokens_than_one_chunk(monkeypatch):
    """Chunked similarities choose as unchunked ones do."""
    tokens = image(5, (7, 9), batch=2)
    specs = (*FIXED, *ADAPTIVE)
    plain = {s: method(s, **({} if s in ADAPTIVE else {"keep": 11}))(tokens) for s in specs}
    for module in (cluster, greedy, merge, score, select, mmtok, par, scope):
        monkeypatch.setattr(module, "CHUNK", 10)
    for spec, expected in plain.items():
        again = method(spec, **({} if spec in ADAPTIVE else {"keep": 11}))(tokens)
        assert again.kept.tolist() == expected.kept.tolist(), spec
        torch.testing.assert_close(again.matrix(), expected.matrix())


def test_a_full_span_goes_on_with_the_best_quality():
    rows = normalise(torch.randn(1, 20, 3))
    quality = torch.rand(1, 20)
    order = dpp_map(rows, quality, 20)[0]
    assert sorted(order.tolist()) == list(range(20))
    rest = quality[0][order[3:]]
    assert bool((rest.diff() <= 0).all())


def test_method_files_are_short():
    for name in FIRST_TUNED:
        assert len(inspect.getsource(inspect.getmodule(find(name))).splitlines()) <= 80, name
