"""The small ViLT before it is fine-tuned: what it starts from, and the packed pass against the stock model."""

import json

import numpy as np
import pytest
import torch
from transformers import ViltForQuestionAnswering

from tokensieve import reference
from tokensieve.engine.fusion.vilt import _RasterOrder
from tokensieve.reference.benchmark import benchmark
from tokensieve.reference.packing import make_packs
from tokensieve.reference.vilt import COPIED, LABELS, build_model, build_processor, copy_tower
from tokensieve.train.pumer.models import load_processors
from tokensieve.train.vilt_reference import ASKED, HIDDEN, Questions, Reader, Stage, normalised, train_vilt_reference


@pytest.fixture(scope="module")
def packs():
    return make_packs("train", range(3), variants=2, turned=0.0)


@pytest.fixture(scope="module")
def reader(packs):
    model = build_model().eval()
    copy_tower(reference.load()[0].model.vision_tower, model, normalised(torch.from_numpy(packs.images)))
    return Reader(model)


@torch.no_grad()
def test_starts_with_the_towers_eyes(reader, packs):
    images = torch.from_numpy(packs.images)
    tower = reference.load()[0].model.vision_tower
    theirs = tower(normalised(images), output_hidden_states=True).hidden_states[COPIED][:, 1:]
    ours = reader.look(images)[-1][:, 1:]
    assert torch.cosine_similarity(ours, theirs, dim=-1).median() > 0.95


@torch.no_grad()
def test_packed_pass_is_the_stock_model_whose_patches_see_no_text(reader, packs):
    questions, images = Questions.of(packs), torch.from_numpy(packs.images)
    tokens, last = questions.tokens[:, 0], questions.last[:, 0]
    states = reader.look(images)
    seen = torch.ones(3, len(ASKED), states[0].shape[1], dtype=torch.bool)
    packed, _ = reader(states, tokens, seen, last)
    vilt = reader.model.vilt
    for number in (0, 4):
        ids = tokens[:, number]
        mask = (ids != 0).long()
        with _RasterOrder():
            hidden, whole = vilt.embeddings(ids, mask, None, normalised(images), torch.ones(3, 120, 120), None, None)
        bias = (1.0 - whole[:, None, None].float()).expand(-1, 1, hidden.shape[1], -1) * HIDDEN
        bias = bias.clone()
        bias[:, :, ids.shape[1] :, : ids.shape[1]] = HIDDEN
        for layer in vilt.encoder.layer:
            hidden = layer(hidden, bias)[0]
        stock = reader.model.classifier(vilt.pooler(vilt.layernorm(hidden)))
        torch.testing.assert_close(packed[:, number], stock, atol=1e-4, rtol=1e-4)


def test_questions_are_the_packed_ones(packs):
    questions, words = Questions.of(packs), build_processor().tokenizer
    ids = questions.tokens[0, 0, 0]
    text = words.decode(ids[ids != 0])
    assert text.startswith("<s> what")
    assert text.endswith("?")
    assert words.decode(ids[questions.last[0, 0, 0] + 1]) == "?"
    assert {LABELS[label] for label in questions.answers[:, :, -1].flatten()} <= {"yes", "no"}


def test_trains_resumes_and_loads(tmp_path):
    stages = (Stage("look", 2, 4, 1e-3), Stage("read", 2, 4, 1e-3))
    given = {"scenes": 8, "report_every": 1}
    train_vilt_reference(tmp_path, stages=stages[:1], **given)
    folder = train_vilt_reference(tmp_path, stages=stages, **given)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("look", 1), ("look", 2), ("read", 1), ("read", 2)]
    assert all(np.isfinite(line["loss"]) for line in lines)
    model = ViltForQuestionAnswering.from_pretrained(folder)
    assert [model.config.id2label[i] for i in range(len(LABELS))] == list(LABELS)
    tokenizer, pictures = load_processors(str(folder))
    image = benchmark("train", 1)[0].image
    assert pictures(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 120, 120)
    assert tokenizer("what colour is the 7?")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.padding_side == "right"
