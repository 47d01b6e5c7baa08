"""Records of a task, from JSONL or the datasets library, and batches of them. An unreadable image never stops a run."""

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

from tokensieve.errors import MissingExtra, Refusal
from tokensieve.train.pumer.tasks import Task

log = logging.getLogger(__name__)
REFERENCE, SCENES = "reference:", 6000  # the bundled questions, and about how many scenes if no slice is given


def read_records(source: str, task: Task) -> Sequence[Mapping[str, Any]]:
    """Records of a task.

    Args:
        source: a JSONL file (images are paths relative to it); ``name`` or ``name:split`` for ``datasets``; or
            ``reference:split``, perhaps with a slice as in ``reference:train[:7000]``, for the bundled question set.

    Raises:
        ValueError: no such file, a line that is no JSON object, or a record without a column of the task.
        ImportError: the source is no file and the datasets library is not installed.
    """
    path = Path(source)
    if source.startswith(REFERENCE):
        records: Sequence[Mapping[str, Any]] = _from_reference(source)
    else:
        records = _from_file(path) if path.suffix in (".jsonl", ".json") or path.exists() else _from_datasets(source)
    if not len(records):
        raise Refusal(f"{source}: no records")
    wanted = [c for c in (*task.images, task.text, task.target) if c is not None]
    lines = range(len(records)) if isinstance(records, list) else range(1)  # a datasets table has the same columns
    for number in lines:
        missing = [column for column in wanted if column not in records[number]]
        if missing:
            raise Refusal(f"{source}, record {number + 1}: no column {missing[0]!r}, which {task.name} needs")
    return records


def _from_reference(source: str) -> list[dict[str, Any]]:
    """Questions about drawn scenes; an image is drawn each time it is needed."""
    from tokensieve.reference.benchmark import PUBLISHED, benchmark

    found = re.fullmatch(r"(\w+)(?:\[:(\d+)\])?", source.removeprefix(REFERENCE))
    if found is None:
        raise Refusal(f"the bundled questions are reference:train or, for a part, reference:train[:700]; got {source}")
    split, count = found[1], int(found[2] or SCENES * len(PUBLISHED))
    rows = benchmark(split, scenes=-(-count // len(PUBLISHED)))[:count]
    return [{"image": row.scene.render, "question": row.question, "answer": row.answer} for row in rows]


def _from_file(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise Refusal(f"no such data file: {path}")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
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
        raise MissingExtra(f"{source} is no file; for the datasets library: pip install datasets") from None
    name, _, split = source.partition(":")
    records: Sequence[Mapping[str, Any]] = load_dataset(name, split=split or "train")
    return records


def label_names(records: Sequence[Mapping[str, Any]], task: Task, most: int = 3129) -> list[str]:
    """Classes for a head that has none yet: the commonest answers, or all labels in alphabetical order."""
    found = Counter(answer for record in records for answer in task.answers(record))
    return [answer for answer, _ in found.most_common(most)] if task.soft else sorted(found)


class Records(Dataset[dict[str, Any]]):
    """Records with their images open.

    A record whose image cannot be read, or without text, is replaced by the next good one, counted and logged.

    Args:
        negatives: texts of other records that come with each image, for retrieval.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], task: Task, labels: Mapping[str, int], negatives: int = 0):
        if negatives >= len(records):
            raise Refusal(f"{negatives} other texts per image need more than {len(records)} records")
        self.records, self.task, self.labels, self.negatives = records, task, labels, negatives
        bad = torch.zeros(len(records), dtype=torch.bool)
        self._bad: Tensor = bad.share_memory_()  # type: ignore[no-untyped-call]  # the loader's workers write here, too

    @property
    def skipped(self) -> int:
        """Records found to be unusable so far."""
        return int(self._bad.sum())

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for step in range(len(self)):
            place = (index + step) % len(self)
            if not self._bad[place]:
                record = self.records[place]
                try:
                    images = [open_image(record[column]) for column in self.task.images]
                    return {"images": images, "texts": self._texts(place), "target": self._target(record)}
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    self._bad[place] = True
                    log.warning("record %d skipped (%d so far): %s", place + 1, self.skipped, error)
        raise Refusal("no record has images that can be read and a text")

    def _texts(self, place: int) -> list[str]:
        others = random.Random(place).sample(range(len(self) - 1), self.negatives)
        places = [place, *(other + (other >= place) for other in others)]
        texts = [str(self.records[p][self.task.text]).strip() for p in places]
        if not texts[0]:
            raise Refusal("the text is empty")
        return [text or "." for text in texts]

    def _target(self, record: Mapping[str, Any]) -> Tensor:
        if self.task.target is None:
            return torch.eye(1, 1 + self.negatives)[0]
        return self.task.scores(self.task.answers(record), self.labels)


def open_image(value: Any) -> Image.Image:
    """An image as RGB: from a path, bytes in a dict (as datasets stores them), an open image, or what draws one."""
    if callable(value):
        value = value()
    if isinstance(value, dict):
        from io import BytesIO

        value = BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    with Image.open(value) as image:
        return image.convert("RGB")


class Collator:
    """Records to model inputs: text tokenised and padded, images processed; ``labels`` `[B, classes]`."""

    def __init__(self, tokenizer: Any, image_processor: Any, longest: int) -> None:
        self.tokenizer, self.image_processor, self.longest = tokenizer, image_processor, longest

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [text for record in records for text in record["texts"]]
        options = {"padding": True, "truncation": True, "max_length": self.longest, "return_tensors": "pt"}
        inputs = dict(self.tokenizer(texts, **options))
        images = [image for record in records for _ in record["texts"] for image in record["images"]]
        seen = dict(self.image_processor(images, return_tensors="pt"))
        per_text = len(records[0]["images"])
        if per_text > 1:
            seen = {name: values.unflatten(0, (-1, per_text)) for name, values in seen.items()}
        targets = torch.stack([record["target"] for record in records])
        wanted = ("input_ids", "attention_mask", "pixel_values", "pixel_mask")
        return {name: v for name, v in {**inputs, **seen}.items() if name in wanted} | {"labels": targets}
