"""Records of a task from JSONL or the datasets library, and their batches. Unreadable records are skipped."""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tokensieve import images
from tokensieve.errors import MissingExtra, Refusal
from tokensieve.train.pumer.tasks import Task

log = logging.getLogger(__name__)
REFERENCE, SCENES = "reference:", 6000  # the bundled questions, and the number of scenes without a slice


def read_records(source: str, task: Task) -> Sequence[Mapping[str, Any]]:
    """Read the records of a task.

    Args:
        source: a JSONL file, with image paths relative to it; or ``name`` or ``name:split`` for ``datasets``; or
            ``reference:split`` for the bundled question set, optionally with a slice: ``reference:train[:7000]``.

    Raises:
        Refusal: if the file does not exist, a line is not a JSON object, or a record lacks a column of the task.
        MissingExtra: if the source is not a file and the datasets library is not installed.
    """
    path = Path(source)
    if source.startswith(REFERENCE):
        records: Sequence[Mapping[str, Any]] = _from_reference(source)
    else:
        records = _from_file(path) if path.suffix in (".jsonl", ".json") or path.exists() else _from_datasets(source)
    if not len(records):
        raise Refusal(f"{source}: no records")
    columns = [column for column in (*task.images, task.text, task.target) if column is not None]
    lines = range(len(records)) if isinstance(records, list) else range(1)  # a datasets table has the same columns
    for number in lines:
        missing = [column for column in columns if column not in records[number]]
        if missing:
            raise Refusal(f"{source}, record {number + 1}: no column {missing[0]!r}, which {task.name} needs")
    return records


def _from_reference(source: str) -> list[dict[str, Any]]:
    """Return questions about scenes, which are drawn each time they are needed."""
    from tokensieve.reference.benchmark import benchmark
    from tokensieve.reference.vilt import ASKED

    match = re.fullmatch(r"(\w+)(?:\[:(\d+)\])?", source.removeprefix(REFERENCE))
    if match is None:
        raise Refusal(f"the bundled questions are reference:train or, for a part, reference:train[:700]; got {source}")
    split, count = match[1], int(match[2] or SCENES * len(ASKED))
    rows = benchmark(split, scenes=-(-count // len(ASKED)), types=ASKED)[:count]
    return [{"image": row.scene.render, "question": row.question, "answer": row.answer} for row in rows]


def _from_file(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise Refusal(f"no such data file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() also splits at breaks inside of JSON texts
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise Refusal(f"{path}, line {number}: not a JSON object")
        for column in ("image", "image2"):
            if isinstance(record.get(column), str):
                record[column] = path.parent / record[column]
        records.append(record)
    return records


def _from_datasets(source: str) -> Sequence[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtra(f"{source} is not a file; the datasets library is needed to load it", "data") from None
    name, _, split = source.partition(":")
    records: Sequence[Mapping[str, Any]] = load_dataset(name, split=split or "train")
    return records


def label_names(records: Sequence[Mapping[str, Any]], task: Task, most: int = 3129) -> list[str]:
    """Return the classes of a new head: the commonest answers, or all labels in alphabetical order."""
    counts = Counter(answer for record in records for answer in task.answers(record))
    return [answer for answer, _ in counts.most_common(most)] if task.soft else sorted(counts)


class Records(Dataset[dict[str, Any]]):
    """Records with loaded images.

    A record without text or with an unreadable image is replaced by the next usable record, counted and logged.

    Args:
        negatives: for retrieval, the number of texts of other records with each image.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], task: Task, labels: Mapping[str, int], negatives: int = 0):
        if negatives >= len(records):
            raise Refusal(f"{negatives} other texts per image need more than {len(records)} records")
        self.records, self.task, self.labels, self.negatives = records, task, labels, negatives
        bad = torch.zeros(len(records), dtype=torch.bool)
        self._bad: Tensor = bad.share_memory_()  # type: ignore[no-untyped-call]  # shared with the loader's workers

    @property
    def skipped(self) -> int:
        """Return the number of records that were skipped so far."""
        return int(self._bad.sum())

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for step in range(len(self)):
            number = (index + step) % len(self)
            if not self._bad[number]:
                record = self.records[number]
                try:
                    opened = [open_image(record[column]) for column in self.task.images]
                    return {"images": opened, "texts": self._texts(number), "target": self._target(record)}
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    self._bad[number] = True
                    log.warning("record %d skipped (%d so far): %s", number + 1, self.skipped, error)
        raise Refusal("no record has images that can be read and a text")

    def _texts(self, number: int) -> list[str]:
        others = random.Random(number).sample(range(len(self) - 1), self.negatives)
        numbers = [number, *(other + (other >= number) for other in others)]  # skips the record itself
        texts = [str(self.records[n][self.task.text]).strip() for n in numbers]
        if not texts[0]:
            raise Refusal("the text is empty")
        "".join(texts).encode()  # fails at half a character (a lone surrogate), which no tokenizer accepts
        return [text or "." for text in texts]

    def _target(self, record: Mapping[str, Any]) -> Tensor:
        if self.task.target is None:
            return torch.eye(1, 1 + self.negatives)[0]
        return self.task.scores(self.task.answers(record), self.labels)


def open_image(value: Any) -> Image.Image:
    """Load an RGB image from a path, a dict of bytes (as in datasets), an image, or a function that returns one."""
    if callable(value):
        value = value()
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        return images.as_rgb(value)
    return images.decode_image(value, "the image") if isinstance(value, bytes) else images.open_image(value)


class Collator:
    """Convert records to model inputs: tokenised and padded text, processed images, ``labels`` `[B, classes]`."""

    def __init__(self, tokenizer: Any, image_processor: Any, longest: int) -> None:
        self.tokenizer, self.image_processor, self.longest = tokenizer, image_processor, longest

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [text for record in records for text in record["texts"]]
        options = {"padding": True, "truncation": True, "max_length": self.longest, "return_tensors": "pt"}
        inputs = dict(self.tokenizer(texts, **options))
        repeated = [image for record in records for _ in record["texts"] for image in record["images"]]
        pixels = dict(self.image_processor(repeated, return_tensors="pt"))
        per_text = len(records[0]["images"])
        if per_text > 1:
            pixels = {name: values.unflatten(0, (-1, per_text)) for name, values in pixels.items()}
        targets = torch.stack([record["target"] for record in records])
        names = ("input_ids", "attention_mask", "pixel_values", "pixel_mask")
        return {name: v for name, v in {**inputs, **pixels}.items() if name in names} | {"labels": targets}
