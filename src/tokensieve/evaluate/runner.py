"""The runs of a comparison on one model: answers read from the journal, or produced and appended to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.evaluate.answer import Answerer, Attached, replaying
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Journal
from tokensieve.evaluate.oracle import oracle
from tokensieve.evaluate.plan import Entry, Run
from tokensieve.evaluate.rows import FULL
from tokensieve.measure import Candidate
from tokensieve.reduction import Reduction

if TYPE_CHECKING:
    from tokensieve.evaluate.compare import Comparison

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called with questions done, questions in all, current run."""
Report: TypeAlias = Callable[[str, int], None]
"""Called with the current run, further questions done."""


class Runner:
    """Completes runs with one answerer.

    Args:
        comparison: names the samples that are left out of every row.
        answerer: answers the questions.
        journal: holds the answers.
        optional: a question that cannot be answered is left out here, and in no row.
    """

    def __init__(self, comparison: Comparison, answerer: Answerer, journal: Journal, *, optional: bool = False) -> None:
        self.comparison, self.journal, self.answerer, self.keys = comparison, journal, answerer, answerer.keys
        self.optional = optional

    def complete(self, run: Run, keep: Budget | None, report: Report) -> None:
        """Answer the questions that have no answer in the journal for this run."""
        comparison, answerer, journal = self.comparison, self.answerer, self.journal
        processes = comparison.processes
        if run.stages:
            attached: Attached = comparison.attached(answerer.model, run)
        else:  # the oracle; the blind row attaches nothing
            decide = partial(self._oracle_decision, keep)
            attached = replaying(answerer.model, decide, comparison.settings.positions)
        done = answerer.finished(journal.answers.get(run.key, {}))
        report(run.key, len(done | (self.keys.values() & journal.skipped.keys())))
        for batch in answerer.run(attached, done, journal.skipped, processes.rank, processes.count):
            parts = processes.exchange(batch)
            answerer.adapt([part.size for part in parts])
            for part in parts:
                # a batch is answered whole; its answers from an earlier call stay as they are
                new = [answer for answer in part.answers if answer.sample not in done]
                journal.add(run.key, new)
                report(run.key, len(new) + len(part.skipped.keys() - done))
                if self.optional:
                    journal.skip(part.skipped)
                elif part.skipped:
                    comparison.leave_out(journal, self.keys, part.skipped)
            failures = [part.failure for part in parts if part.failure]
            if failures and not self.optional:
                method = run.key.partition(" #")[0]  # without the digest of its code
                raise Refusal(f"{method}: {failures[0]}; the answers so far are kept in {journal.path}")

    def candidate(self, entry: Entry, sample: Sample) -> Candidate:
        """Return the method of a row's first run, or the oracle's decision for the sample."""
        return entry.runs[0].stages or [self._oracle_decision(entry.keep, sample)]

    def _oracle_decision(self, keep: Budget | None, sample: Sample) -> list[Reduction]:
        """Return the oracle's decision for each image of a sample, on the token grids that earlier runs recorded."""
        assert keep is not None
        runs, key, images = self.journal.answers, self.answerer.keys[sample.id], len(sample.images)
        tokens = runs[FULL][key].before // images  # of an image; images of a sample with boxes have equally many
        # the tokens of several images form no grid; that of a sample with one such image is the same
        of_sample = (answers[key] for answers in runs.values() if key in answers)
        of_others = (answer for answers in runs.values() for answer in answers.values() if images > 1)
        answered = (answer for answer in chain(of_sample, of_others) if answer.before == tokens)
        grid = next((answer.grid for answer in answered if answer.grid), None)
        boxes = [()] * (images - 1) + [sample.boxes]  # places in the last image
        return [oracle(b, sample.open(n).size, tokens, grid, keep) for n, b in enumerate(boxes)]


class Steps:
    """Sums the finished questions for the caller's callback."""

    def __init__(self, callback: Progress | None, total: int) -> None:
        self.callback, self.total, self.done = callback, total, 0

    def __call__(self, label: str, more: int) -> None:
        self.done += more
        if self.callback is not None:
            self.callback(self.done, self.total, label)
