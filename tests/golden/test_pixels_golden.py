"""PixelPrune against the authors' decision about documents, screens, gradients and noise."""

import torch

import tokensieve
from tests.golden.pictures import pixel_values, speckled, stored
from tests.golden.vectors import cases, entries, load
from tests.support import models, prompts
from tests.support.families import BOS, IMAGE, Image, Sample, around


@cases("pixelprune")
def test_pixelprune(name):
    given, expected, hp = load("pixelprune", name)
    height, width = hp["grid"]
    pixels = pixel_values(speckled(stored(given["png"]), hp["seed"], hp["levels"]))
    inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2 * height, 2 * width]])}
    ids = around([IMAGE] * height * width)
    sample = Sample([BOS, *ids], [Image(inputs, ids, (height, width))])
    with tokensieve.attach(models.tiny_model("qwen3-vl"), "pixelprune", tolerance=hp["tolerance"]) as sieve:
        sieve.model.generate(**prompts.collate("qwen3-vl", [sample]), max_new_tokens=1)
    assert sieve.last[0][0].kept.tolist() == expected["kept"].tolist()


def test_the_cases_differ():
    """Speckles and tolerances change the decision: each picture but the noise has several kept sets."""
    kept: dict[str, set[tuple[int, ...]]] = {}
    for case in entries()["pixelprune"]["cases"]:
        _, expected, _ = load("pixelprune", case["case"])
        kept.setdefault(case["case"].split("_")[0], set()).add(tuple(expected["kept"].tolist()))
    assert all(len(kept[kind]) >= 2 for kind in ("document", "table", "screen", "gradient"))
