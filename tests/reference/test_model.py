"""The shipped model: loads offline, speaks its vocabulary, and answers."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokensieve import reference
from tokensieve.reference.model import build_tokenizer, vocabulary

SAMPLE = 40  # scenes


@pytest.fixture(scope="module")
def loaded():
    return reference.load()


def test_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="bundled model 'big' is unknown; use one of reference"):
        reference.path("big")


def test_tokenizer_round_trip() -> None:
    tokenizer = build_tokenizer()
    words = vocabulary()[7:]
    ids = tokenizer(" ".join(words)).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *words]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(words)
    assert tokenizer.tokenize("Is the Zebra, top-left?") == ["is", "the", "<unk>", "<unk>", "top-left", "?"]
    assert tokenizer.padding_side == "left"


def test_auto_classes_load_the_directory() -> None:
    model = AutoModelForImageTextToText.from_pretrained(reference.path(), local_files_only=True)
    processor = AutoProcessor.from_pretrained(reference.path(), local_files_only=True)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert model.dtype == torch.float32
    assert model.config.vision_feature_layer == -2
    assert model.config.vision_feature_select_strategy == "default"
    assert sum(file.stat().st_size for file in reference.path().iterdir()) < 16 * 2**20


def test_chat_template_and_image_tokens(loaded) -> None:
    _, processor = loaded
    content = [{"type": "image"}, {"type": "text", "text": "where is the star?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == "USER: <image>\nwhere is the star? ASSISTANT:"
    inputs = processor(images=Image.new("RGB", (120, 120)), text=prompt, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 144
    assert inputs["pixel_values"].shape == (1, 3, 120, 120)


def test_shipped_weights_answer_held_out_questions(loaded) -> None:
    """Plain `generate` in left-padded batches: the answer, then the end, and mostly right in every type."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    from tokensieve.reference.benchmark import benchmark, shortcuts
    from tokensieve.reference.card import answers, shares

    rows = benchmark("test", scenes=SAMPLE)
    texts = answers(*loaded, rows)
    right = shares(rows, texts)
    assert {len(text.split()) for text in texts} <= {1, 2}
    assert {row.type for row, text in zip(rows, texts, strict=True) if len(text.split()) == 2} == {"point"}
    assert right["all"].right / right["all"].asked > 0.85
    for type, guess in shortcuts(rows).items():
        share = right[type].right / right[type].asked
        assert share > 0.6, type
        assert share > guess.best + 0.2, type


def test_the_gate_measures_every_type(loaded) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    from tokensieve.reference.card import gate
    from tokensieve.reference.questions import TYPES

    head, _, *lines = gate(reference.path(), "validation", scenes=8).splitlines()
    assert head == "| type | accuracy (95 %) | no image | chance | majority | best shortcut | which |"
    table = {line.split(" | ")[0].strip("| *"): line.split(" | ")[1] for line in lines if line.startswith("|")}
    assert tuple(table) == (*TYPES, "all")
    assert "it invents an answer in" in lines[-1]
