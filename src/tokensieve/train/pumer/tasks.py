"""The four tasks: their records, their heads and their losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import (
    BridgeTowerForImageAndTextRetrieval,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
)

from tokensieve.errors import Refusal
from tokensieve.fusion.meter import (
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
)


@dataclass(frozen=True)
class Task:
    """One task: the columns of its records, its model classes and its loss.

    Attributes:
        name: name on the command line.
        text, target: columns of a record; a task without target matches texts with images.
        images: image columns, one per image of a record.
        models: model class by model type.
        soft: each answer has a score of its own, as several may be right; otherwise one class is right.
    """

    name: str
    text: str
    target: str | None
    images: tuple[str, ...]
    models: Mapping[str, type[Any]]
    soft: bool = False

    def answers(self, record: Mapping[str, Any]) -> list[str]:
        """Return the right answers of a record; repeated answers count."""
        value = record[self.target] if self.target else []
        return [str(v) for v in (value if isinstance(value, list) else [value])]

    def scores(self, answers: Sequence[str], labels: Mapping[str, int]) -> Tensor:
        """Return the target `[classes]`: 1 for the right answer, or VQAv2's min(count / 3, 1) of several answers."""
        target = torch.zeros(len(labels))
        for answer, count in Counter(answers).items():
            if answer in labels:
                target[labels[answer]] = 1.0 if len(answers) < 3 else min(count / 3, 1.0)
        return target

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of ``logits`` for ``targets``, both `[B, classes]`."""
        if self.soft:
            return binary_cross_entropy_with_logits(logits, targets) * targets.shape[1]
        return cross_entropy(logits, targets.argmax(1))

    def ranked(self, logits: Tensor) -> Tensor:
        """Return the scores that rank classes `[B, classes]`, or the candidate texts of an image, from ``logits``."""
        return logits


class Retrieval(Task):
    """Match an image with its text: the first of the candidate texts is right, the others are of other records."""

    def ranked(self, logits: Tensor) -> Tensor:
        return logits[..., -1]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets.argmax(1))


_ANSWERS = {"vilt": ViltForQuestionAnswering, "meter": MeterForQuestionAnswering}
_PAIRS = {"vilt": ViltForImagesAndTextClassification, "meter": MeterForImagesAndTextClassification}
_MATCHING = {
    "vilt": ViltForImageAndTextRetrieval,
    "meter": MeterForImageAndTextRetrieval,
    "bridgetower": BridgeTowerForImageAndTextRetrieval,
}
TASKS: dict[str, Task] = {
    "vqa": Task("vqa", "question", "answer", ("image",), _ANSWERS, soft=True),
    "ve": Task("ve", "sentence", "label", ("image",), _ANSWERS),
    "nlvr2": Task("nlvr2", "sentence", "label", ("image", "image2"), _PAIRS),
    "retrieval": Retrieval("retrieval", "text", None, ("image",), _MATCHING),
}


def task_named(name: str) -> Task:
    """Return the task of this name; refuse an unknown name."""
    if name not in TASKS:
        raise Refusal(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def accuracy(prediction: Any) -> dict[str, float]:
    """Return a metric for the Trainer: the mean score of the answers that rank first."""
    logits, targets = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {"accuracy": float(targets.gather(1, logits.argmax(1, keepdim=True)).mean())}
