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
    """What one task asks.

    Attributes:
        name: as on the command line.
        text, target: columns of a record; no target: matching a text with its image.
        images: image columns, one per image of a record.
        models: model type to class.
        soft: answers are scored one by one (several may be right), else one class is right.
    """

    name: str
    text: str
    target: str | None
    images: tuple[str, ...]
    models: Mapping[str, type[Any]]
    soft: bool = False

    def answers(self, record: Mapping[str, Any]) -> list[str]:
        """The right answers of a record, as often as they were given."""
        value = record[self.target] if self.target else []
        return [str(v) for v in (value if isinstance(value, list) else [value])]

    def scores(self, answers: Sequence[str], labels: Mapping[str, int]) -> Tensor:
        """Target `[classes]`: 1 on the right answer; VQAv2's min(given / 3, 1) where several people answered."""
        target = torch.zeros(len(labels))
        for answer, given in Counter(answers).items():
            if answer in labels:
                target[labels[answer]] = 1.0 if len(answers) < 3 else min(given / 3, 1.0)
        return target

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``logits`` and ``targets`` `[B, classes]`."""
        if self.soft:
            return binary_cross_entropy_with_logits(logits, targets) * targets.shape[1]
        return cross_entropy(logits, targets.argmax(1))

    def ranked(self, logits: Tensor) -> Tensor:
        """Logits as one row per record: `[B, classes]` as they are, or `[B, candidates]` of matching scores."""
        return logits


class Retrieval(Task):
    """Each image comes with its own text first and texts of other records after it; the first one must win."""

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
    """The task; ``ValueError`` naming those there are."""
    if name not in TASKS:
        raise Refusal(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def accuracy(prediction: Any) -> dict[str, float]:
    """Metric for the Trainer: the mean score of the answer that ranks first."""
    logits, targets = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {"accuracy": float(targets.gather(1, logits.argmax(1, keepdim=True)).mean())}
