"""Images that the vision encoder receives in tiles."""

import pytest

from tests.support.models import build
from tests.vllm.checkpoints import picture
from tests.vllm.compare import assert_equal_to_transformers
from tokensieve import Refusal
from tokensieve.vllm import engine_options

PROMPTS = [
    ("IMG what is a b c", [picture(1, 112, 84)]),
    ("what IMG is one IMG d e", [picture(2, 230, 110), picture(3, 42, 90)]),
    ("IMG the colour of f", [picture(4, 200, 220)]),
]
TILES = [5, 3, 3, 5]  # of Idefics3, by the sizes of the pictures


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_adjacent_tiles_are_one_image(positions, tmp_path):
    assert_equal_to_transformers("internvl", positions, PROMPTS, tmp_path)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_each_tile_between_markers_is_an_image(positions, tmp_path):
    assert_equal_to_transformers("idefics3", positions, PROMPTS, tmp_path, tiles=TILES)


def test_gemma_3_is_refused_with_the_reason(tmp_path):
    build("gemma3").config.save_pretrained(tmp_path)
    with pytest.raises(Refusal, match=r"gemma3 cannot be reduced in vLLM: .* both directions"):
        engine_options(str(tmp_path), "uniform(keep=4)", positions="contiguous")
