"""Newer in-LLM methods against the authors' code at 576 tokens; ``make_*.py`` beside this file made the numbers."""

import pytest
import torch
from torch.testing import assert_close

import tokensieve
from tests.golden import make_autoprune, make_vlm_pruner
from tests.golden.drawn import attention_rows, bells
from tests.golden.make_priortr import START, TOKENS, rows_of, small_llava, states_of
from tests.golden.make_trio import llava_with_head
from tests.golden.vectors import CLOSE, cases, load
from tokensieve import parse
from tokensieve.methods.autoprune import AutoPrune, information
from tokensieve.tokens import DecoderTokens, DecoderUserText

QUERY = {"question": "all", "last": "last"}


def method(spec):
    (found,) = parse(spec)
    return found


def image_columns(rows):
    return rows[..., START : START + TOKENS]


def text(rows):
    """Return as many words as there are queries in attention `[1, H, Q, L]`."""
    return DecoderUserText(torch.zeros(1, rows.shape[2], 1), torch.ones(1, rows.shape[2], dtype=torch.bool))


@cases("priortr")
def test_priortr(name):
    _, expected, h = load("priortr", name)
    rows, query = rows_of(h), QUERY[h["query"]]
    tokens = DecoderTokens(
        torch.zeros(1, TOKENS, 1),
        attention=image_columns(rows if query == "all" else rows[:, :, -1:]),
        separator_attention=image_columns(rows[:, :, 0]),
        user_text=text(rows) if query == "all" else None,
    )
    decision = method(f"priortr(keep={h['keep']}, query='{query}')")(tokens)[0]
    assert_close(decision.scores, expected["scores"], atol=1e-7, rtol=1e-4)
    assert decision.kept.tolist() == expected["kept"].tolist()


@cases("priortr_model")
def test_priortr_attached(name):
    _, expected, h = load("priortr_model", name)
    model, inputs = small_llava(h)
    spec = f"priortr(keep={h['keep']}, layer={h['layer']}, query='{QUERY[h['query']]}')"
    with tokensieve.attach(model, spec) as sieve, torch.no_grad():
        model(**inputs)
    assert_close(sieve.last[0][0].scores, expected["scores"], atol=1e-7, rtol=1e-3)
    assert sieve.last[0][0].kept.tolist() == expected["kept"].tolist()


def clse_tokens(h, attention, grid):
    first, now = states_of(h)
    return DecoderTokens(now, grid=grid, attention=attention, input_embeddings=first, budget=h.get("count", 1))


@cases("clse")
def test_clse(name):
    _, expected, h = load("clse", name)
    tokens = clse_tokens(h, image_columns(rows_of(h)[:, :, -1:]), (24, 24) if h["stage"] == 0 else None)
    decision = method("clse")(tokens)[0]
    assert_close(decision.scores, expected["scores"], atol=1e-7, rtol=1e-3)
    assert decision.kept.tolist() == expected["kept"].tolist()


@cases("clse_grid")
def test_clse_on_other_grids(name):
    _, expected, h = load("clse_grid", name)
    attention = attention_rows(h["seed"], 1, 1, h["tokens"])[:, :, None]
    scores = method("clse")(clse_tokens(h, attention, tuple(h["grid"])))[0].scores
    assert_close(scores, expected["scores"], atol=1e-5, rtol=1e-3)


@cases("clse_model")
def test_clse_attached(name):
    _, expected, h = load("clse_model", name)
    model, inputs = small_llava(h)
    with tokensieve.attach(model, f"clse(layers=(1,), counts=({h['count']},))") as sieve, torch.no_grad():
        model(**inputs)
    assert sieve.last[0][0].kept.tolist() == expected["kept"].tolist()


def text_tokens(h):
    attention = make_autoprune.text_attention(h)
    return DecoderTokens(
        make_autoprune.states_of(h), attention=attention, user_text=text(attention), budget=h.get("count", 1)
    )


@cases("autoprune_curve")
def test_autoprune_curve(name):
    _, expected, h = load("autoprune_curve", name)
    tokens, depth = text_tokens(h), make_autoprune.DEPTH
    assert_close(information(tokens), expected["bits"], atol=1e-4, rtol=1e-3)
    # both layers before the first cut receive all tokens; theirs counts one, and the tokens after the last layer
    average = (2 * h["tokens"] + h["through"] - h["last"]) / depth
    spec = AutoPrune(keep=average / h["tokens"])
    (numbers,) = spec.schedule(tokens, spec.layer_numbers(depth), depth)
    assert numbers == expected["counts"].tolist()[:-1]


@cases("autoprune_layer")
def test_autoprune_layer(name):
    _, expected, h = load("autoprune_layer", name)
    tokens = text_tokens(h)
    decision = AutoPrune(appended=True, noise_seed=h["noise_seed"])(tokens)[0]
    rows, count = decision.apply(tokens.features[0]), h["count"]
    assert ((decision.source >= 0) & (decision.source < count)).nonzero().flatten().tolist() == expected[
        "kept"
    ].tolist()
    assert_close(rows[count:], expected["merged"], **CLOSE)


@cases("trio_model")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_trio_attached(name, mode):
    _, expected, h = load("trio_model", name)
    model, inputs = llava_with_head(h)
    with tokensieve.attach(model, f"trio(layers=({h['layer']},), keep={h['keep']})") as sieve, mode():
        model(**inputs)
    assert sieve.last[0][0].kept.tolist() == expected["kept"].tolist()
    assert all(weight.grad is None for weight in model.parameters())


@cases("vlm_pruner")
def test_vlm_pruner(name):
    _, expected, h = load("vlm_pruner", name)
    tokens = make_vlm_pruner.TOKENS
    places = torch.arange(tokens)
    image = DecoderTokens(
        make_vlm_pruner.states_of(h),
        keys=make_vlm_pruner.keys_of(h),
        coordinates=torch.stack([places // 24, places % 24], -1)[None],
        grid=(24, 24),
    )
    keep, budget = len(expected["kept"]), round(tokens * (1 - h["ratio"]))
    spec = f"vlm-pruner(batch={h.get('batch', 16)}, pivots={h.get('pivots', 4)}, keep="
    decision = method(f"{spec}{keep})")(image)[0]
    assert decision.kept.tolist() == expected["kept"].tolist()
    assert (keep < budget) == h.get("short", False), "the official code may stop before the budget; here never"
    whole = method(f"{spec}{budget})")(image)[0].kept.tolist()
    assert len(whole) == budget
    assert set(decision.kept.tolist()) <= set(whole)
    rows = decision.apply(image.features[0])
    numbers = torch.stack([rows.sum(-1), rows @ bells(h["seed"] + 6, h["width"])], -1)
    assert_close(numbers, expected["numbers"], atol=2e-3, rtol=1e-4)
