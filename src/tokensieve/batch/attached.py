"""Answers of a transformers model with methods attached, in the batches of ``compare``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokensieve.batch.job import Job, Outcome
from tokensieve.evaluate.answer import Answerer, Attached, answerer_class, attaching, in_order
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.provenance import environment
from tokensieve.loading import load_model


class AttachedModel:
    """The model of a job, loaded once.

    Attributes:
        environment: versions and hardware.

    Raises:
        Refusal: the model does not load, or does not support a method.
    """

    def __init__(self, job: Job) -> None:
        self.model, self.processor = load_model(job.model, job.loading, classifiers=True)
        self.settings = job.settings
        self.environment: Mapping[str, Any] = environment(self.model)
        size = job.settings.batch_size
        self.size = 16 if size == "auto" else size
        self.runs: dict[str, Attached] = {}
        options = job.settings.attach_options() | {"reselect": job.settings.reselect}
        for run in job.runs():
            self.runs[run.key] = attaching(self.model, run.stages, self.processor, **options)
            self.runs[run.key]([]).detach()  # a method that this model cannot run is refused before the first answer

    def answer(self, samples: Sequence[Sample]) -> Iterator[tuple[str, str, Outcome]]:
        """Yield (run key, sample id, outcome). Each batch is decoded and processed once for all runs."""
        ordered = in_order(samples)
        while ordered:
            batch, ordered = ordered[: self.size], ordered[self.size :]
            answerer = self._answerer(batch)
            for key, attached in self.runs.items():
                outcomes = self._outcomes(answerer, attached)
                yield from ((key, name, outcome) for name, outcome in outcomes.items())

    def _answerer(self, samples: Sequence[Sample]) -> Answerer:
        keys = {sample.id: sample.id for sample in samples}
        return answerer_class(self.model)(self.model, self.processor, samples, self.settings, keys)

    def _outcomes(self, answerer: Answerer, attached: Attached) -> Mapping[str, Outcome]:
        """Return the outcome of each sample of a batch by its id."""
        outcomes: dict[str, Outcome] = {}
        while True:
            (batch,) = answerer.run(attached, set(), {})
            outcomes |= {answer.sample: answer for answer in batch.answers}
            outcomes |= {name: skipped.reason for name, skipped in batch.skipped.items()}
            self.size = min(self.size, max(1, batch.size))  # what did not fit into memory once will not fit later
            remaining = [sample for sample in answerer.samples if sample.id not in outcomes]
            if not remaining:
                return outcomes
            # the batch ended at its first remaining sample: a method refuses it, or it does not fit into memory alone
            first, *others = remaining
            outcomes[first.id] = batch.failure.removeprefix(first.error_prefix)
            if not others:
                return outcomes
            answerer = self._answerer(others)
