"""A tiny LLaVA with random weights, saved with its processor, and questions about a few of the bundled scenes."""

import json
from pathlib import Path

import pytest

from tokensieve.reference.benchmark import benchmark
from tokensieve.reference.model import build_model, build_processor


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Path:
    """The folder of the model, with ``train.jsonl`` beside it."""
    root = tmp_path_factory.mktemp("tuning")
    build_model(width=16, vision_layers=2, text_layers=3).save_pretrained(root / "llava")
    build_processor().save_pretrained(root / "llava")
    lines = []
    for row in benchmark("train", scenes=4, types=("colour", "name", "frame")):
        name = f"{row.scene.index}.png"
        row.image.save(root / name)
        lines.append({"image": name, "question": row.question, "answer": row.answer})
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root / "llava"
