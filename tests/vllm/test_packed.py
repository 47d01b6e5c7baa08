"""Pixtral towers: images of any size, packed, with row breaks between their tokens in the prompt."""

import pytest

from tests.vllm.checkpoints import picture
from tests.vllm.compare import assert_equal_to_transformers

PROMPTS = [
    ("IMG what is a b c", [picture(1, 112, 84)]),
    ("what IMG is one IMG d e", [picture(2, 98, 98), picture(3, 84, 126)]),
    ("IMG the colour of f", [picture(4, 140, 56)]),
    ("IMG shape", [picture(5, 56, 28)]),
]


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("family", ["pixtral", "mistral3"])
def test_answers_and_kept_tokens_equal_transformers(family, positions, tmp_path):
    assert_equal_to_transformers(family, positions, PROMPTS, tmp_path)
