"""A toy data set for each recipe, in the layout and with the columns of the hub."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from tokensieve.reproduce.recipes import COGNITION, PERCEPTION

Rows = list[dict[str, Any]]


def picture(number: int) -> dict[str, Any]:
    """Return an image as the hub stores it, wider than high."""
    file = io.BytesIO()
    Image.new("RGB", (160, 120), ((37 * number) % 256, (91 * number) % 256, 80)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


def annotators(answer: str) -> list[str]:
    return [answer] * 9 + [""]


def _gqa() -> Rows:
    return [
        {"id": str(i), "imageId": f"n{i}", "question": "Is it red?", "answer": "yes", "fullAnswer": "Yes."}
        for i in range(4)
    ]


def _mmbench() -> Rows:
    rows = []
    for i in range(2):
        for turn in range(2):
            options = ["red", "blue"] if turn == 0 else ["blue", "red"]
            rows.append(
                {
                    "index": i + turn * 1_000_000, "question": "Which?", "hint": "nan" if i else "Look.",
                    "A": options[0], "B": options[1], "C": "nan", "D": "nan", "answer": "AB"[turn],
                    "category": "c", "image": picture(i),
                }
            )  # fmt: skip
    return rows


def _mme(categories: tuple[str, ...]) -> Rows:
    return [
        {
            "question_id": f"{category}/0.png", "image": picture(i), "category": category, "answer": answer,
            "question": f"Is it {answer}?  Please answer yes or no.",
        }
        for i, category in enumerate(categories)
        for answer in ("Yes", "No")
    ]  # fmt: skip


def _pope() -> Rows:
    return [
        {
            "id": str(i), "question_id": str(i), "question": "Is there a dog in the image?",
            "answer": ("yes", "no")[i % 2],
            "image_source": f"COCO_{i}", "image": picture(i), "category": ("random", "popular", "adversarial")[i // 2],
        }
        for i in range(6)
    ]  # fmt: skip


def _sqa() -> Rows:
    return [
        {
            "image": picture(i),
            "question": "Which?",
            "choices": ["red", "blue", "green"],
            "answer": i % 3,
            "hint": "Look." * (i % 2),
        }
        for i in range(4)
    ]


def _vqav2() -> Rows:
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(annotators("red"))]
    return [{"question_id": i, "question": "What is it?", "answers": answers, "image": picture(i)} for i in range(3)]


def _annotated() -> Rows:
    row = {"question": "what does it say?", "answers": annotators("stop"), "ocr_tokens": ["STOP", "now"]}
    return [row | {"question_id": i, "image": picture(i)} for i in range(3)]


def _seed() -> Rows:
    options = {"choice_a": "red", "choice_b": "blue", "choice_c": "green", "choice_d": "white"}
    return [
        options
        | {"question": "Which?", "answer": "ABCD"[i], "data_type": kind, "question_id": str(i), "image": [picture(i)]}
        for i in range(4)
        for kind in ("image", "video")
    ]


def _free() -> Rows:
    return [
        {
            "question_id": f"v1_{i}",
            "question": "Describe it.",
            "answer": "red",
            "gpt_answer": "It is red.",
            "image": picture(i),
        }
        for i in range(2)
    ]


# the folder and file of the hub, and the rows
TOYS: dict[str, dict[str, Rows]] = {
    "gqa": {
        "testdev_balanced_instructions/testdev-00000-of-00001.parquet": _gqa(),
        "testdev_balanced_images/testdev-00000-of-00001.parquet": [
            {"id": f"n{i}", "image": picture(i)} for i in range(4)
        ],
    },
    "mmbench-en": {"en/dev-00000-of-00001.parquet": _mmbench(), "cn/dev-00000-of-00001.parquet": []},
    "mmbench-cn": {"cn/dev-00000-of-00001.parquet": _mmbench()},
    "mme": {"data/test-00000-of-00001-a25dbe3b44c4fda6.parquet": _mme(PERCEPTION + COGNITION)},
    "mme-total": {"data/test-00000-of-00001-a25dbe3b44c4fda6.parquet": _mme(PERCEPTION + COGNITION)},
    "pope": {
        "data/test-00000-of-00002.parquet": _pope()[:4],
        "data/test-00001-of-00002.parquet": _pope()[4:],
        "Full/random-00000-of-00001.parquet": _pope()[:1],
    },
    "sqa": {"ScienceQA-IMG/test-00000-of-00001.parquet": _sqa(), "ScienceQA-FULL/test-00000-of-00001.parquet": []},
    "vqav2": {"data/validation-00000-of-00001.parquet": _vqav2(), "data/testdev-00000-of-00001.parquet": []},
    "textvqa": {"data/validation-00000-of-00001.parquet": _annotated()},
    "vizwiz": {"data/val-00000-of-00001.parquet": _annotated()},
    "seed": {"data/test-00000-of-00001.parquet": _seed()},
    "mm-vet": {"data/test-00000-of-00001.parquet": _free()},
    "llava-bench": {"data/train-00000-of-00001.parquet": _free()},
}  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """Write the toy data set of a recipe; return its folder."""
    for file, rows in TOYS[name].items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return folder


def write_lines(rows: Rows, folder: Path, file: str) -> Path:
    """Write rows as JSON lines, with each image in a file beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        name = f"{number}.png"
        (folder / name).write_bytes(row["image"]["bytes"])
        lines.append(json.dumps(row | {"image": name}))
    (folder / file).write_text("\n".join(lines) + "\n", "utf-8")
    return folder
