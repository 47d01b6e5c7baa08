"""Run a data set through many methods and budgets, resumably."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from tokensieve.budget import Budget, BudgetScope
from tokensieve.errors import DataError, Refusal
from tokensieve.evaluate.answer import Answerer, Attached, answerer_class, attaching, unreadable
from tokensieve.evaluate.average import Thresholds
from tokensieve.evaluate.blind import blind_answerer, refusal
from tokensieve.evaluate.costs import row_costs
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Journal
from tokensieve.evaluate.lock import locked
from tokensieve.evaluate.metrics import METRICS, check_answers
from tokensieve.evaluate.plan import Entry, KeepMeans, Run, Settings
from tokensieve.evaluate.processes import Processes
from tokensieve.evaluate.prompt import check_one_image, check_texts
from tokensieve.evaluate.provenance import (
    environment,
    is_bundled,
    loading_facts,
    model_identity,
    model_name,
    predictions_setup,
    sample_key,
)
from tokensieve.evaluate.referee import referee as refereed
from tokensieve.evaluate.results import RESULTS, Example, Results, Skipped, skipped_note
from tokensieve.evaluate.rows import BLIND
from tokensieve.evaluate.runner import Progress, Runner, Steps
from tokensieve.evaluate.stability import row_overlaps
from tokensieve.evaluate.table import Table, choose, store
from tokensieve.loading import DEFAULTS, LoadOptions
from tokensieve.methods import Repair
from tokensieve.models.layout import Separators


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
    repair: Repair | None = None,
    reselect: bool = False,
    prompt: str = "{question}",
    processor_for_text: bool = True,
    trained: Any = None,
    loading: LoadOptions = DEFAULTS,
    measure: bool = True,
    examples: int = 4,
    strict: bool = False,
    referee: bool = True,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> Results:
    """Answer every sample with every method at every budget, greedily, and score the answers.

    The unhooked model ("full") always runs, and first. A method with an open ``seed`` runs with ``seeds`` of them. A
    spec that gives its own ``keep`` runs once, at that budget. Data with boxes adds an "oracle" row per budget. The
    last row is "blind", the model without the image, unless the processor makes no such prompt. Every row carries the
    findings of the :mod:`~tokensieve.evaluate.referee`.

    A question whose image cannot be read is skipped in every row, listed in ``Results.skipped`` and named in a warning.

    Each prediction is appended to ``output/predictions.jsonl`` at once, and ``output/results.json``
    (:class:`~tokensieve.evaluate.Results`) is replaced after each row. The same call again continues from there. Costs
    are measured once all answers are there, for all rows together; until then they are ``None``.

    Args:
        model: a vision-language model with nothing attached, in eval mode on its device; or a cross-modal encoder that
            classifies answers (a ViLT or METER for question answering), which gets no oracle row and no blind one.
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
        batch_size, max_new_tokens, metric, seeds, keep_means, budget_scope, separators, repair, reselect, prompt,
            processor_for_text, measure, examples, strict, referee: see :class:`~tokensieve.evaluate.plan.Settings`.

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
        repair=repair,
        reselect=reselect,
        prompt=prompt,
        processor_for_text=processor_for_text,
        measure=measure,
        examples=examples,
        strict=strict,
        referee=referee,
    )
    comparison = Comparison(model, processor, samples, settings, trained, loading, processes)
    results = comparison.run(methods, keeps, Path(output), progress)
    if results.skipped and comparison.processes.first:
        warnings.warn(skipped_note(results), stacklevel=2)
    return results


def check_inputs(model: Any, processor: Any, samples: Sequence[Sample], settings: Settings) -> None:
    """Refuse a model or samples that no question can be asked with.

    Raises:
        Refusal: no samples, an id that two have, a model in training mode, or a placeholder in a text.
        DataError: a right answer that the metric cannot read.
    """
    if not samples:
        raise Refusal("there are no samples")
    ids = Counter(sample.id for sample in samples)
    if repeated := [name for name, count in ids.items() if count > 1]:
        raise Refusal(f"the id {repeated[0]!r} is used twice; ids of samples are unique")
    if model.training:
        raise Refusal("the model is in training mode; call model.eval() first")
    check_texts(processor, samples, settings.prompt)
    check_answers(settings.metric, samples)


class Comparison:
    """One model and one data set under fixed settings. Arguments as for :func:`compare`.

    Attributes:
        samples: those that can be read, as far as it is known.
        skipped: the others.
        no_blind: the reason why there is no blind row; "" if there is one.

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
        check_inputs(model, processor, samples, settings)
        if trained is not None and type(trained) is not type(model):
            raise Refusal(f"a {type(trained).__name__} cannot be compared with a {type(model).__name__}")
        if not model.can_generate():
            check_one_image(samples)
        self.model, self.trained, self.processor = model, trained, processor
        self.all_samples, self.settings, self.processes = samples, settings, processes or Processes()
        self.samples, self.skipped = list(samples), list[Skipped]()
        self.loading = loading
        self.no_blind = refusal(model, processor, samples[0], settings.prompt)
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
        models = [model for model in (self.model, self.trained) if model is not None]
        example_ids = {sample.id for sample in examples}
        runners = [Runner(self, self.answerer(model, self.all_samples, keys, example_ids), journal) for model in models]
        blind = Runner(self, blind_answerer(self, keys, journal), journal)
        report = Steps(progress, len(self.all_samples) * sum(len(entry.runs) for entry in entries))
        stored = store(examples, output) if self.processes.first else []
        table, added = self._table(stored), list[Entry]()
        results: Any = None  # of the first process only
        for entry in entries:
            runner = blind if entry.method == BLIND else runners[entry.trained]
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
            self._save(table, output, machine, complete=False)
        shown = [sample for sample in examples if sample in self.samples] if self.settings.referee else []
        overlaps = row_overlaps(self, entries, shown, keys, journal, report)
        if self.processes.first:
            table.add_overlaps(overlaps)
            if self.settings.measure:
                report("timing", 0)
                table.add_costs(row_costs(self, entries, runners, journal, machine))
            results = self._save(table, output, machine, complete=True)
        all_results: list[Results] = self.processes.exchange(results)
        return all_results[0]

    def _save(self, table: Table, output: Path, machine: dict[str, Any], *, complete: bool) -> Results:
        results = table.results(complete=complete, environment=machine, settings=self._facts(), skipped=self.skipped)
        if complete:
            results = refereed(results)
        results.save(output / RESULTS)
        return results

    def answerer(
        self, model: Any, samples: Sequence[Sample], keys: Mapping[str, str], examples: AbstractSet[str]
    ) -> Answerer:
        """Return what answers with one of the models."""
        return answerer_class(model)(model, self.processor, samples, self.settings, keys, examples)

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

    def _entries(self, methods: Sequence[str], keeps: Sequence[Budget]) -> list[Entry]:
        """Return the rows to run. A method that this model cannot run is refused here, before anything runs."""
        oracle = self.model.can_generate() and any(sample.boxes for sample in self.samples)
        blind = self.settings.referee and not self.no_blind
        full, *others = self.settings.plan(methods, keeps, oracle=oracle, blind=blind)
        thresholds = Thresholds(
            self.model, self.processor, self.samples, self.settings.prompt, self.text_processor, self.processes
        )
        others = [entry.with_stages_of(thresholds.fill_in) for entry in others]
        for run in (run for entry in (full, *others) for run in entry.runs if run.stages):
            self.attached(self.model, run)(self.samples[:1]).detach()
        if self.trained is not None:
            others = [row for entry in others for row in (entry, entry.fine_tuned())]
        return [full, *others]

    def attached(self, model: Any, run: Run) -> Attached:
        """Attach the methods of a run to one of the models."""
        options = self.settings.attach_options() | {"reselect": self.settings.reselect}
        return attaching(model, run.stages, self.text_processor, **options)

    def _journal_setup(self) -> dict[str, Any]:
        """Return all that two calls must have in common to share predictions."""
        trained = {} if self.trained is None else {"trained": model_identity(self.trained)}
        return predictions_setup(self.model, self.processor, self.settings) | trained

    def _facts(self) -> dict[str, Any]:
        """Return the settings as the report shows them."""
        names = ("metric", "seeds", "keep_means", "batch_size")
        about: dict[str, Any] = {"model": model_name(self.model), "samples": len(self.samples)}
        if self.settings.referee and self.no_blind:
            about["no_blind"] = self.no_blind
        if loaded := loading_facts(self.model, self.loading):
            about["loading"] = loaded
        if is_bundled(self.model) and any(sample.where for sample in self.all_samples):
            about["foreign_images"] = True  # the data are a user's file, the model knows its own scenes only
        return self.settings.prediction_setup() | about | {name: getattr(self.settings, name) for name in names}
