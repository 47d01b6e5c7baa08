"""One worker: a model with its methods that answers the rows of a part. Ray Data makes one in each actor."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from tokensieve.batch.job import Job, Outcome
from tokensieve.batch.parts import AnswerRow
from tokensieve.batch.source import Part, Row
from tokensieve.errors import Refusal
from tokensieve.evaluate.data import Sample


class Answering(Protocol):
    """A model that answers samples, whichever engine runs it.

    Attributes:
        environment: versions and hardware, as in the results of ``compare``.
    """

    environment: Mapping[str, Any]

    def answer(self, samples: Sequence[Sample]) -> Iterator[tuple[str, str, Outcome]]:
        """Yield (run key, sample id, outcome) for every sample and run."""


class Worker:
    """A callable of Ray Data, made once in each actor.

    A user's error or a bug travels in the outcome of a part: exceptions, which Ray retries or drops, mean that a worker
    was lost.

    Args:
        job: the batch.
        threads: CPU threads of torch.
    """

    def __init__(self, job: Job, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.job = job
        self.failure: dict[str, Any] = {}
        try:
            self.model = _model(job)
        except Exception as error:
            self.failure = _failure(error)

    def __call__(self, block: Mapping[str, Any]) -> dict[str, list[str]]:
        """Answer the parts of a block, which has one: its column ``part`` holds JSON, as ``outcome`` does."""
        outcomes = []
        for text in block["part"]:
            part = Part(**json.loads(str(text)))
            try:
                outcome = self.failure or self._answered(part)
            except Exception as error:
                outcome = _failure(error)
            outcomes.append(json.dumps({"number": part.number} | outcome))
        return {"outcome": outcomes}

    def _answered(self, part: Part) -> dict[str, Any]:
        rows = self.job.read(part)
        outcomes: dict[tuple[str, str], Outcome] = {}
        samples = [row.sample for row in rows if row.sample is not None]
        for run, name, outcome in self.model.answer(samples):
            outcomes[name, run] = outcome
        runs = [run.key for run in self.job.runs()]
        lines = [_answer_row(row, run, row.error or outcomes[row.source, run]) for row in rows for run in runs]
        return {"rows": [asdict(line) for line in lines], "environment": dict(self.model.environment)}


def _model(job: Job) -> Answering:
    if job.engine == "vllm":
        from tokensieve.batch.vllm import VllmModel

        return VllmModel(job)
    from tokensieve.batch.attached import AttachedModel

    return AttachedModel(job)


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, Refusal | OSError):
        return {"refusal": " ".join(str(error).split())}
    return {"bug": "".join(traceback.format_exception(error))}


def _answer_row(row: Row, run: str, outcome: Outcome) -> AnswerRow:
    about: dict[str, Any] = {}
    if row.sample is not None and row.sample.answers:
        sample = row.sample
        about = {"type": sample.type, "answers": sample.answers, "choices": sample.choices, "images": row.images}
    if isinstance(outcome, str):
        return AnswerRow(row.id, row.source, run, error=outcome, **about)
    before = None if outcome.before < 0 else outcome.before
    return AnswerRow(row.id, row.source, run, outcome.text, before, outcome.after, outcome.average, **about)
