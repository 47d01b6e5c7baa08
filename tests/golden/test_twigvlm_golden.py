"""TwigVLM's choice and the tokens that leave before both layers, against the authors' forward."""

import torch

from tests.golden.vectors import cases, load
from tokensieve import parse
from tokensieve.tokens import DecoderTokens


@cases("twigvlm_ttp")
def test_the_authors_forward(name):
    inputs, expected, h = load("twigvlm_ttp", name)
    visual, hidden = (inputs["image_tags"][0] == 1).nonzero()[:, 0], inputs["hidden"]
    text = (inputs["image_tags"][0] != 1).nonzero()[:, 0]
    (method,) = parse("twigvlm", weights="random", layers=(h["K"], h["wipe"]), average=h["R"])
    kept, none = method.stage_budgets(len(visual), method.layer_numbers(h["depth"]), h["depth"])
    assert (kept, none) == (int(expected["rank"]), 0)
    attention = inputs["attention"][:, :, -1:, visual]
    first = method(DecoderTokens(hidden[:, visual], attention=attention, budget=kept))[0]
    second = method(DecoderTokens(first.apply(hidden[0, visual])[None]))[0]
    for layer, stay in (("k", visual[first.kept]), ("w", visual[first.kept][second.kept])):
        columns = torch.cat([text, stay]).sort().values
        assert torch.equal(columns, expected[f"positions_{layer}"][0])
        assert torch.equal(hidden[:, columns], expected[f"hidden_{layer}"])
