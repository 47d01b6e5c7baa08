"""The requests of a run: images that no cache has seen, and questions of a given length."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from tokensieve.load.cells import Cell

BLOCKS = 16  # noise of so many blocks a side: every image differs, and its JPEG stays small
POOL = 4  # images that repeated requests share
WORDS = (
    "what", "where", "which", "how", "many", "colour", "shape", "size", "the", "a", "one", "other", "small",
    "large", "round", "red", "blue", "green", "yellow", "left", "right", "above", "below", "near", "of", "in", "on",
    "between", "picture", "table", "cup", "street", "tree", "house", "window", "letter", "number", "sign", "person",
)  # fmt: skip


def data_url(width: int, height: int, key: str) -> str:
    """Return an image as a data URL. It is decided by the key, and another key gives another image."""
    noise = Image.frombytes("RGB", (BLOCKS, BLOCKS), random.Random(key).randbytes(3 * BLOCKS * BLOCKS))
    file = io.BytesIO()
    noise.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def question(words: int, key: str) -> str:
    """Return a question with so many words, decided by the key."""
    return " ".join(random.Random(key).choices(WORDS, k=words))


def contents(
    cell: Cell, count: int, *, repeat_share: float, key: str, pool_key: str, seed: int
) -> list[list[dict[str, Any]]]:
    """Return the contents of the user turns of a run: one image and one question each.

    Args:
        repeat_share: share of the requests whose image belongs to a pool of few, which the warm-up has sent.
        key: of this run; it decides the images outside the pool, and the questions.
        pool_key: of the pool, which all runs of a cell share.
        seed: decides which requests repeat an image.
    """
    repeated = set(random.Random(f"{seed} repeated").sample(range(count), round(repeat_share * count)))
    images = [f"{pool_key} {index % POOL}" if index in repeated else f"{key} image {index}" for index in range(count)]
    return [content(cell, image, f"{key} question {index}") for index, image in enumerate(images)]


def pool(cell: Cell, pool_key: str) -> list[list[dict[str, Any]]]:
    """Return one user turn for each image of the pool."""
    return [content(cell, f"{pool_key} {index}", f"{pool_key} question {index}") for index in range(POOL)]


def content(cell: Cell, image_key: str, question_key: str) -> list[dict[str, Any]]:
    """Return one user turn in OpenAI's form, the image before the question."""
    return [
        {"type": "image_url", "image_url": {"url": data_url(cell.width, cell.height, image_key)}},
        {"type": "text", "text": question(cell.words, question_key)},
    ]


def body(model: str, turn: Sequence[Mapping[str, Any]], output_tokens: int, fields: Mapping[str, Any]) -> bytes:
    """Return the JSON of a streaming chat request; ``fields`` are further fields of the body."""
    request = {
        "model": model,
        "messages": [{"role": "user", "content": turn}],
        "max_tokens": output_tokens,
        "temperature": 0,
        "stream": True,
        **fields,
    }
    return json.dumps(request).encode()
