"""Questions about several images, through the whole comparison, in families with one and with many inputs per image."""

import json
from dataclasses import replace

import pytest
import torch

from tests.support.models import build
from tests.support.processors import processor as tiny_processor
from tokensieve import Refusal
from tokensieve.evaluate import Results, compare, encode, encode_pairs, load_data
from tokensieve.evaluate.prompt import image_numbers, without_repetitions
from tokensieve.evaluate.provenance import sample_key

ROWS = [
    {"image": ["0.png", "1.png"], "question": "what is the first image ?", "answer": "red"},
    {"image": "2.png", "question": "is this red ?", "answer": "A", "choices": ["red", "blue"]},
    {"image": ["1.png", "3.png", "1.png"], "question": "which one of the picture", "answer": "left"},
    {"image": ["0.png"], "question": "what is the image", "answer": "left"},
]
COUNTS = [2, 1, 3, 1]


@pytest.fixture
def several(write):
    return load_data(write(ROWS))


def predictions(folder):
    """Return {(run, sample): (answer, tokens before, tokens after)}."""
    lines = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    return {(p["run"], p["sample"]): (p["text"], p["before"], p["after"]) for p in lines if "text" in p}


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen2-vl"])
def test_a_comparison_answers_as_one_question_at_a_time(name, several, model, processor, tmp_path):
    model, processor = (model, processor) if name == "llava" else (build(name), tiny_processor(name))
    methods = ["divprune", "random", "fastv(layer=1)"]
    for size in (4, 1):
        options = {"batch_size": size, "seeds": 1, "measure": False, "max_new_tokens": 6, "referee": False}
        rows = compare(model, processor, several, methods, [0.25], output=tmp_path / str(size), **options).rows
    together, alone = (predictions(tmp_path / size) for size in ("4", "1"))
    assert len(together) == 16
    assert together == alone
    assert all(after < before for (run, _), (_, before, after) in together.items() if run != "full")
    if name == "llava":  # 144 tokens an image
        assert [alone["full", sample_key(sample)][1] for sample in several] == [144 * count for count in COUNTS]
        assert rows[0].tokens_before == 144 * sum(COUNTS) / 4
    shown = Results.load(tmp_path / "4" / "results.json").examples
    assert [e.question.endswith("(the first of 2 images is shown)") for e in shown] == [True, False, False, False]
    assert "B. blue" in shown[1].question


def test_the_images_stand_in_their_order(several, model, processor):
    swapped = replace(several[0], image=several[0].images[::-1])
    first, second = (encode(processor, [sample])["pixel_values"] for sample in (several[0], swapped))
    assert first.shape == (2, 3, 120, 120)
    assert torch.equal(first, second.flip(0))
    assert sample_key(several[0]) != sample_key(swapped)


def test_each_image_of_a_batch_is_encoded_once(several, model, processor):
    assert image_numbers(several) == [0, 1, 2, 1, 3, 1, 0]
    shared = without_repetitions(model, encode(processor, several), image_numbers(several))
    assert shared.images == (0, 1, 2, 1, 3, 1, 0)
    assert len(shared.tensors["pixel_values"]) == 4


def test_a_classifier_takes_one_image(several, processor):
    with pytest.raises(Refusal, match=r"data\.jsonl, line 1: this model answers questions about one image; got 2"):
        encode_pairs(processor, several, longest=40)


def test_lists_of_images_in_a_csv_cell(write, tmp_path):
    write([])
    text = 'image,question,answer\n"[""0.png"", ""1.png""]",what?,x\n[1].png,who?,y\n'
    (tmp_path / "[1].png").write_bytes((tmp_path / "2.png").read_bytes())
    (tmp_path / "data.csv").write_text(text)
    first, second = load_data(tmp_path / "data.csv")
    assert first.images == (tmp_path / "0.png", tmp_path / "1.png")
    assert second.image == tmp_path / "[1].png"


def test_choices_are_part_of_the_prompt(several, processor):
    ids = encode(processor, several[1:2])["input_ids"][0]
    plain = encode(processor, [replace(several[1], choices=())])["input_ids"][0]
    assert len(ids) > len(plain)
    assert sample_key(several[1]) != sample_key(replace(several[1], choices=("blue", "red")))
