"""Answers of configurations to blocks of questions: read from the journal, or produced and appended to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokensieve.errors import DataError, Refusal
from tokensieve.evaluate.answer import Answerer, Attached, attaching
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.intervals import Floats
from tokensieve.evaluate.journal import Answer, Journal
from tokensieve.evaluate.metrics import METRICS, answers_for
from tokensieve.evaluate.plan import Settings
from tokensieve.evaluate.provenance import sample_key
from tokensieve.evaluate.rows import FULL
from tokensieve.tune.space import Candidate


class Asker:
    """One model that answers blocks of questions under configurations.

    A block is answered by all configurations before the next one begins, so that its images are processed once.

    Args:
        journal: keeps each answer as soon as it is there.
        settings: prompt, metric, length of an answer, batch size, budget scope and separators.

    Attributes:
        keys: {id of a sample: its key in the journal}.
    """

    def __init__(
        self, model: Any, processor: Any, samples: Sequence[Sample], settings: Settings, journal: Journal
    ) -> None:
        self.model, self.processor, self.settings, self.journal = model, processor, settings, journal
        self.keys = {sample.id: sample_key(sample) for sample in samples}
        self._answerer: tuple[Sequence[Sample], Answerer] | None = None

    def ask(self, candidate: Candidate | None, block: Sequence[Sample]) -> int:
        """Answer the questions of a block that have no answer yet; return the number of new answers.

        Args:
            candidate: ``None`` is the unreduced model.

        Raises:
            Refusal: the method refuses a question, or a question alone does not fit into memory.
            DataError: no image can be read.
        """
        key, journal, answerer = self.key(candidate), self.journal, self._of(block)
        answers = journal.answers.get(key, {})
        done, count = answerer.finished(answers), 0
        for batch in answerer.run(self._attached(candidate), done, journal.skipped):
            answerer.adapt([batch.size])
            new = [answer for answer in batch.answers if answer.sample not in done]
            journal.add(key, new)
            journal.skip(batch.skipped)
            count += len(new)
            if batch.failure:
                raise Refusal(f"{key}: {batch.failure}")
        if candidate is None and all(self.keys[sample.id] in journal.skipped for sample in block):
            raise DataError(f"none of {len(block)} images can be read; {next(iter(journal.skipped.values())).reason}")
        return count

    def scores(self, candidate: Candidate | None, samples: Sequence[Sample]) -> Floats:
        """Return the score of each answer `[questions]`, NaN where the question was skipped."""
        answers, metric = self.answers(candidate), METRICS[self.settings.metric]
        scores = np.full(len(samples), np.nan)
        for number, sample in enumerate(samples):
            answer = answers.get(self.keys[sample.id])
            if answer is not None:
                scores[number] = metric(answer.text, answers_for(metric, sample))
        return scores

    def answers(self, candidate: Candidate | None) -> Mapping[str, Answer]:
        """Return the answers of a configuration by the key of their sample."""
        return self.journal.answers.get(self.key(candidate), {})

    @staticmethod
    def key(candidate: Candidate | None) -> str:
        """Return the key of a configuration's answers in the journal."""
        return FULL if candidate is None else candidate.run.key

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the processor's tensors for some samples, on the model's device."""
        return self._of(samples).inputs(samples)

    def _of(self, block: Sequence[Sample]) -> Answerer:
        if self._answerer is None or self._answerer[0] is not block:
            self._answerer = block, Answerer(self.model, self.processor, block, self.settings, self.keys)
        return self._answerer[1]

    def _attached(self, candidate: Candidate | None) -> Attached:
        method = FULL if candidate is None else candidate.run.stages
        positions = "original" if candidate is None else candidate.positions
        options = self.settings.attach_options() | {"positions": positions}
        return attaching(self.model, method, self.processor, **options)
