"""Run a data set through many methods and budgets, resumably."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tokensieve.budget import Budget, BudgetScope
from tokensieve.errors import DataError, Refusal
from tokensieve.evaluate.answer import (
    Answerer,
    Attached,
    Classifier,
    attaching,
    is_out_of_memory,
    replaying,
    unreadable,
)
from tokensieve.evaluate.costs import session_costs
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Journal
from tokensieve.evaluate.lock import locked
from tokensieve.evaluate.metrics import METRICS, check_answers
from tokensieve.evaluate.oracle import oracle
from tokensieve.evaluate.plan import Entry, KeepMeans, Run, Settings
from tokensieve.evaluate.processes import Processes
from tokensieve.evaluate.prompt import check_one_image, check_texts
from tokensieve.evaluate.provenance import (
    code_digest,
    environment,
    is_bundled,
    loading_facts,
    model_identity,
    model_name,
    processor_identity,
    sample_key,
)
from tokensieve.evaluate.results import Example, Results, Skipped
from tokensieve.evaluate.rows import FULL
from tokensieve.evaluate.table import Table, choose, store
from tokensieve.loading import DEFAULTS, LoadOptions
from tokensieve.measure import Candidate, Cost, measure_costs
from tokensieve.models.layout import Separators
from tokensieve.reduction import Reduction
from tokensieve.version import __version__

RESULTS = "results.json"
NAMED = 10  # skipped questions that the note names
Progress: TypeAlias = Callable[[int, int, str], None]


def compare(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    methods: Sequence[str],
    keeps: Sequence[Budget],
    *,
    output: str | Path,
    batch_size: int | Literal["auto"] = 16,
    max_new_tokens: int = 16,
    metric: str = "exact",
    seeds: int = 5,
    keep_means: KeepMeans = "final",
    budget_scope: BudgetScope = "image",
    separators: Separators = "kept-lines",
    prompt: str = "{question}",
    processor_for_text: bool = True,
    trained: Any = None,
    loading: LoadOptions = DEFAULTS,
    measure: bool = True,
    examples: int = 4,
    strict: bool = False,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> Results:
    """Answer every sample with every method at every budget, greedily, and score the answers.

    The unhooked model ("full") always runs, and first. A method with an open ``seed`` runs with ``seeds`` of them. A
    spec that gives its own ``keep`` runs once, at that budget. Data with boxes adds an "oracle" row per budget.

    A question whose image cannot be read is skipped in every row, listed in ``Results.skipped`` and named in a warning.

    Each prediction is appended to ``output/predictions.jsonl`` at once, and ``output/results.json``
    (:class:`~tokensieve.evaluate.Results`) is replaced after each row. The same call again continues from there. Costs
    are measured once all answers are there, for all rows together; until then they are ``None``.

    Args:
        model: a vision-language model with nothing attached, in eval mode on its device; or a cross-modal encoder that
            classifies answers (a ViLT or METER for question answering), which gets no oracle row.
        processor: its processor.
        samples: see :func:`~tokensieve.evaluate.load_data`.
        methods: method specs.
        keeps: budgets: an int is tokens per image, a float in (0, 1] a share of them.
        output: folder of the results, created if it is missing.
        trained: the same model fine-tuned with reduction. Each method then has a second row, "… fine-tuned", on it.
        loading: the options that model and processor were loaded with; they are recorded in the results.
        progress: called with (questions done, questions in all, current run).
        processes: share the work with other processes of a launcher, each of which makes this call:
            ``Processes.launched()``.
        batch_size, max_new_tokens, metric, seeds, keep_means, budget_scope, separators, prompt,
            processor_for_text, measure, examples, strict: see :class:`~tokensieve.evaluate.plan.Settings`.

    Raises:
        Refusal: unknown method, metric or parameter; a bad budget; nothing to run. Also a method that refuses a sample,
            or a sample that does not fit into memory alone; the predictions so far are kept.
        DataError: no image can be read, or with ``strict`` one cannot.
        ResumeError: ``output`` holds the predictions of another model or other settings.
        OutputError: another process writes to ``output``, or a file cannot be written (a full disk). All lines written
            before are kept.
    """
    settings = Settings(
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        metric=metric,
        seeds=seeds,
        keep_means=keep_means,
        budget_scope=budget_scope,
        separators=separators,
        prompt=prompt,
        processor_for_text=processor_for_text,
        measure=measure,
        examples=examples,
        strict=strict,
    )
    comparison = Comparison(model, processor, samples, settings, trained, loading, processes)
    results = comparison.run(methods, keeps, Path(output), progress)
    if results.skipped and comparison.processes.first:
        warnings.warn(skipped_note(results), stacklevel=2)
    return results


def skipped_note(results: Results) -> str:
    """Return one line that names the first questions that were skipped, and the reason of the first."""
    skipped, numbers = results.skipped, dict[str, list[str]]()
    for entry in skipped[:NAMED]:
        place, _, number = entry.where.rpartition(" ")  # "data.jsonl, line" and "7"
        numbers.setdefault(place or "question", []).append(number or entry.id)
    places = [f"{place}{'s' * (len(listed) > 1)} {', '.join(listed)}" for place, listed in numbers.items()]
    more = [f"{len(skipped) - NAMED} more in {RESULTS}"] if len(skipped) > NAMED else []
    text, total = "; ".join([*places, *more]), len(skipped) + len(results.questions)
    return f"{len(skipped)} of {total} questions skipped: images cannot be read ({text}: {skipped[0].reason})"


class Comparison:
    """One model and one data set under fixed settings. Arguments as for :func:`compare`.

    Attributes:
        samples: those that can be read, as far as it is known.
        skipped: the others.

    Raises:
        Refusal: no samples, an id that two have, a placeholder in a question, or a model that cannot be compared.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Sequence[Sample],
        settings: Settings,
        trained: Any = None,
        loading: LoadOptions = DEFAULTS,
        processes: Processes | None = None,
    ) -> None:
        if not samples:
            raise Refusal("no samples to compare on")
        ids = Counter(sample.id for sample in samples)
        if repeated := [name for name, count in ids.items() if count > 1]:
            raise Refusal(f"the id {repeated[0]!r} is used twice; ids of samples are unique")
        if model.training:
            raise Refusal("the model is in training mode; call model.eval() first")
        if trained is not None and type(trained) is not type(model):
            raise Refusal(f"a {type(trained).__name__} cannot be compared with a {type(model).__name__}")
        check_texts(processor, samples, settings.prompt)
        check_answers(settings.metric, samples)
        if not model.can_generate():
            check_one_image(samples)
        self.model, self.trained, self.processor = model, trained, processor
        self.all_samples, self.settings, self.processes = samples, settings, processes or Processes()
        self.samples, self.skipped = list(samples), list[Skipped]()
        self.loading = loading
        self.text_processor = processor if settings.processor_for_text else None

    def run(
        self, methods: Sequence[str], keeps: Sequence[Budget], output: Path, progress: Progress | None = None
    ) -> Results:
        """Fill the table row by row and save it after each; return the results.

        Of several processes, each answers a part of every run; the first one alone scores, measures and writes.
        """
        with self.processes.together():
            entries = self._entries(methods, keeps)
            with locked(output) if self.processes.first else nullcontext():
                return self._run(entries, output, progress)

    def _run(self, entries: Sequence[Entry], output: Path, progress: Progress | None) -> Results:
        journal, keys, examples = self._start(output)
        machine = environment(self.model)
        runners = [
            _Runner(self, model, keys, {sample.id for sample in examples}, journal)
            for model in (self.model, self.trained)
            if model is not None
        ]
        report = _Progress(progress, len(self.all_samples) * sum(len(entry.runs) for entry in entries))
        stored = store(examples, output) if self.processes.first else []
        table, added = self._table(stored), list[Entry]()
        results: Any = None  # of the first process only
        for entry in entries:
            runner = runners[entry.trained]
            for run in entry.runs:
                runner.complete(run, entry.keep, report)
            if not self.processes.first:
                continue
            added.append(entry)
            new = [entry]
            if len(table.samples) > len(self.samples):  # every row is scored on the same samples, the earlier ones, too
                table, new = self._table(stored), added
            for row in new:
                runs = [journal.answers[run.key] for run in row.runs]
                table.add(row, [{s.id: answers[keys[s.id]] for s in self.samples} for answers in runs])
            complete = entry is entries[-1] and not self.settings.measure
            results = self._save(table, output, machine, complete=complete)
        if self.processes.first and self.settings.measure:
            report("timing", 0)
            table.add_costs(self._costs(entries, runners, journal, machine))
            results = self._save(table, output, machine, complete=True)
        all_results: list[Results] = self.processes.exchange(results)
        return all_results[0]

    def _save(self, table: Table, output: Path, machine: dict[str, Any], *, complete: bool) -> Results:
        results = table.results(complete=complete, environment=machine, settings=self._facts(), skipped=self.skipped)
        results.save(output / RESULTS)
        return results

    def _start(self, output: Path) -> tuple[Journal, dict[str, str], list[Sample]]:
        """Return the journal, the samples' keys in it and the examples: read by the first process, sent to all."""
        texts = [(sample.id, sample.question) for sample in self.all_samples]
        setup = self._journal_setup()
        digest = hashlib.sha256(json.dumps([setup, texts], default=str).encode()).hexdigest()
        start: Any = None
        if self.processes.first:
            journal, keys = Journal(output, setup), {sample.id: sample_key(sample) for sample in self.all_samples}
            self.leave_out(journal, keys, {})
            start = journal, keys, {sample.id for sample in self._examples(journal, keys)}
        starts = self.processes.exchange((digest, start))
        if len({other for other, _ in starts}) > 1:
            raise Refusal("the processes do not compare the same model on the same data")
        journal, keys, example_ids = starts[0][1]
        journal.writes = self.processes.first
        self.leave_out(journal, keys, {})
        return journal, keys, [sample for sample in self.all_samples if sample.id in example_ids]

    def _examples(self, journal: Journal, keys: Mapping[str, str]) -> list[Sample]:
        """Return the samples to show, of images that can be read."""
        while True:
            examples = choose(self.samples, self.settings.examples)
            damaged = unreadable(examples)
            if not damaged:
                return examples
            self.leave_out(journal, keys, {keys[name]: entry for name, entry in damaged.items()})

    def _table(self, examples: Sequence[Example]) -> Table:
        shown = {sample.id for sample in self.samples}
        metric = METRICS[self.settings.metric]
        return Table(self.samples, metric, [example for example in examples if example.id in shown])

    def leave_out(self, journal: Journal, keys: Mapping[str, str], damaged: Mapping[str, Skipped]) -> None:
        """Take samples that cannot be read, by key, out of every row.

        Raises:
            DataError: no sample remains, or ``strict`` is set.
        """
        journal.skip(damaged)
        skipped = {sample.id: journal.skipped.get(keys[sample.id]) for sample in self.all_samples}
        self.skipped = [entry for entry in skipped.values() if entry is not None]
        self.samples = [sample for sample in self.all_samples if skipped[sample.id] is None]
        if self.skipped and (self.settings.strict or not self.samples):
            first = self.skipped[0]
            count = "" if self.settings.strict else f"none of the {len(self.all_samples)} images can be read; "
            raise DataError(f"{count}{first.where or first.id}: {first.reason}")

    def _costs(
        self, entries: Sequence[Entry], runners: Sequence[_Runner], journal: Journal, machine: dict[str, Any]
    ) -> list[Cost]:
        """Return the cost of every row, from one session of rounds that all rows share, on the first sample.

        Rows of the fine-tuned model are paired with the compared model, too.
        """
        sample, others = self.samples[0], entries[1:]

        def measure() -> list[Cost]:
            return measure_costs(
                self.model,
                runners[0].answerer.inputs([sample]),
                [runners[entry.trained].candidate(entry, sample) for entry in others],
                models=[runners[entry.trained].answerer.model for entry in others],
                processor=self.text_processor,
                budget_scope=self.settings.budget_scope,
                separators=self.settings.separators,
            )

        keys = [entry.runs[0].key for entry in entries]
        try:
            return session_costs(journal, {**machine, "sample": sample_key(sample)}, keys, measure)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise Refusal(
                "memory ran out while the costs of one prompt were measured; the answers are kept, and the same "
                "comparison without measuring (--no-measure, measure=False) gives their results"
            ) from error

    def _entries(self, methods: Sequence[str], keeps: Sequence[Budget]) -> list[Entry]:
        """Return the rows to run. A method that this model cannot run is refused here, before anything runs."""
        # boxes are places in one image
        one_image = all(len(sample.images) == 1 for sample in self.samples)
        oracle = self.model.can_generate() and one_image and any(sample.boxes for sample in self.samples)
        full, *others = self.settings.plan(methods, keeps, oracle=oracle)
        for run in (run for entry in (full, *others) for run in entry.runs if run.stages):
            self.attached(self.model, run)(self.samples[:1]).detach()
        if self.trained is not None:
            others = [row for entry in others for row in (entry, entry.fine_tuned())]
        return [full, *others]

    def attached(self, model: Any, run: Run) -> Attached:
        """Attach the methods of a run to one of the models."""
        options = {name: getattr(self.settings, name) for name in ("budget_scope", "separators")}
        return attaching(model, run.stages, self.text_processor, **options)

    def _journal_setup(self) -> dict[str, Any]:
        """Return all that two calls must have in common to share predictions."""
        trained = {} if self.trained is None else {"trained": model_identity(self.trained)}
        versions = {"tokensieve": __version__, "code": code_digest(), "processor": processor_identity(self.processor)}
        return versions | self.settings.prediction_setup() | model_identity(self.model) | trained

    def _facts(self) -> dict[str, Any]:
        """Return the settings as the report shows them."""
        names = ("metric", "seeds", "keep_means", "batch_size")
        about: dict[str, Any] = {"model": model_name(self.model), "samples": len(self.samples)}
        if loaded := loading_facts(self.model, self.loading):
            about["loading"] = loaded
        if is_bundled(self.model) and any(sample.where for sample in self.all_samples):
            about["foreign_images"] = True  # the data are a user's file, the model knows its own scenes only
        return self.settings.prediction_setup() | about | {name: getattr(self.settings, name) for name in names}


class _Runner:
    """Answers of the runs on one of the models, read from the journal or produced and appended to it."""

    def __init__(
        self, comparison: Comparison, model: Any, keys: Mapping[str, str], examples: set[str], journal: Journal
    ) -> None:
        answering = Answerer if model.can_generate() else Classifier
        self.comparison, self.journal, self.keys = comparison, journal, keys
        self.answerer = answering(
            model, comparison.processor, comparison.all_samples, comparison.settings, keys, examples
        )

    def complete(self, run: Run, keep: Budget | None, report: _Progress) -> None:
        """Answer the questions that have no answer in the journal for this run."""
        comparison, answerer, journal = self.comparison, self.answerer, self.journal
        processes = comparison.processes
        if run.stages:
            attached = comparison.attached(answerer.model, run)
        else:
            attached = replaying(answerer.model, partial(self._oracle_decision, keep))
        done = answerer.finished(journal.answers.get(run.key, {}))
        report(run.key, len(done | {self.keys[entry.id] for entry in comparison.skipped}))
        for batch in answerer.run(attached, done, journal.skipped, processes.rank, processes.count):
            parts = processes.exchange(batch)
            answerer.adapt([part.size for part in parts])
            for part in parts:
                # a batch is answered whole; its answers from an earlier call stay as they are
                new = [answer for answer in part.answers if answer.sample not in done]
                journal.add(run.key, new)
                report(run.key, len(new) + len(part.skipped.keys() - done))
                if part.skipped:
                    comparison.leave_out(journal, self.keys, part.skipped)
            if failures := [part.failure for part in parts if part.failure]:
                method = run.key.partition(" #")[0]  # without the digest of its code
                raise Refusal(f"{method}: {failures[0]}; the answers so far are kept in {journal.path}")

    def candidate(self, entry: Entry, sample: Sample) -> Candidate:
        """Return the method of a row's first run, or the oracle's decision for the sample."""
        return entry.runs[0].stages or [[self._oracle_decision(entry.keep, sample)]]

    def _oracle_decision(self, keep: Budget | None, sample: Sample) -> Reduction:
        """Return the oracle's decision for a sample, on the token grid that an earlier run recorded."""
        assert keep is not None
        runs, key = self.journal.answers, self.answerer.keys[sample.id]
        grids = (answers[key].grid for answers in runs.values() if key in answers)
        return oracle(sample.boxes, sample.open().size, runs[FULL][key].before, next(filter(None, grids), None), keep)


class _Progress:
    """Sums the finished questions for the caller's callback."""

    def __init__(self, callback: Progress | None, total: int) -> None:
        self.callback, self.total, self.done = callback, total, 0

    def __call__(self, label: str, more: int) -> None:
        self.done += more
        if self.callback is not None:
            self.callback(self.done, self.total, label)
