"""Pixtral towers: images of any size, packed, with row breaks between their tokens in the prompt."""

import json

import pytest

from tests.support.models import build
from tests.vllm.checkpoints import picture
from tests.vllm.compare import assert_equal_to_transformers
from tokensieve import Refusal
from tokensieve.vllm import engine_options

PROMPTS = [  # sides of whole 28 pixels: vLLM 0.30 counts the tokens of other sizes wrongly in Mistral 3
    ("IMG what is a b c", [picture(1, 112, 84)]),
    ("what IMG is one IMG d e", [picture(2, 112, 112), picture(3, 84, 140)]),
    ("IMG the colour of f", [picture(4, 140, 56)]),
    ("IMG shape", [picture(5, 56, 28)]),
]


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("family", ["pixtral", "mistral3"])
def test_answers_and_kept_tokens_equal_transformers(family, positions, tmp_path):
    assert_equal_to_transformers(family, positions, PROMPTS, tmp_path)


def test_layers_that_vllm_does_not_build_are_refused(tmp_path):
    build("pixtral-wide").config.save_pretrained(tmp_path)
    assert engine_options(str(tmp_path), "prumerge+(keep=7)")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -2}))
    assert engine_options(str(tmp_path), "vtc-cls(keep=7)")
    with pytest.raises(
        Refusal, match=r"prumerge\+ cannot run on Pixtral .*reads layer 3 of 4, and vLLM builds the first 3"
    ):
        engine_options(str(tmp_path), "prumerge+(keep=7)")
