"""Newer in-LLM methods against the authors' code at 576 tokens; ``make_*.py`` beside this file made the numbers."""

import torch
from torch.testing import assert_close

import tokensieve
from tests.golden.make_priortr import START, TOKENS, rows_of, small_llava
from tests.golden.vectors import cases, load
from tokensieve import parse
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
