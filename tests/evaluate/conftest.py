"""A very small untrained model with the reference processor, and questions about noise."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tokensieve.evaluate import load_data
from tokensieve.reference.model import build_model, build_processor

QUESTIONS = ("what colour is the anchor?", "is there a star?", "where is the cup?", "what does the sign say?")


@pytest.fixture(scope="session")
def model():
    model = build_model(width=32, vision_layers=3, text_layers=2).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)  # so that its answers depend on image and question
    return model


@pytest.fixture(scope="session")
def processor():
    return build_processor()


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSONL beside four images 0.png … 3.png; returns the file."""
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (60 + 20 * i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")

    def write(rows):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def samples(write):
    """Ten questions about four images; two types."""
    rows = [
        {"image": f"{i % 4}.png", "question": QUESTIONS[i % 3], "answer": "red", "type": ("even", "odd")[i % 2]}
        for i in range(10)
    ]
    return load_data(write(rows))
