"""Run a data set through many methods and budgets, resumably."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from tokensieve.budget import Budget, BudgetScope
from tokensieve.errors import DataError, Refusal
from tokensieve.evaluate.answer import Answerer, Attached, Classifier, attaching, replaying
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Answer, Journal
from tokensieve.evaluate.oracle import oracle
from tokensieve.evaluate.plan import Entry, KeepMeans, Run, Settings
from tokensieve.evaluate.prompt import check_texts
from tokensieve.evaluate.provenance import environment, loading_facts, model_identity, model_name, processor_identity
from tokensieve.evaluate.results import FULL, Row
from tokensieve.evaluate.scoring import METRICS
from tokensieve.evaluate.table import Table, choose, store
from tokensieve.loading import DEFAULTS, LoadOptions
from tokensieve.measure import Bench, Cost
from tokensieve.reduction import Reduction
from tokensieve.version import __version__

RESULTS = "results.json"
Progress: TypeAlias = Callable[[int, int, str], None]


def compare(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    methods: Sequence[str],
    keeps: Sequence[Budget],
    *,
    output: Path,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    metric: str = "exact",
    seeds: int = 3,
    keep_means: KeepMeans = "final",
    budget_scope: BudgetScope = "image",
    prompt: str = "{question}",
    processor_for_text: bool = True,
    trained: Any = None,
    loading: LoadOptions = DEFAULTS,
    measure: bool = True,
    examples: int = 4,
    progress: Progress | None = None,
) -> list[Row]:
    """Answer every sample with every method at every budget, greedily, and score the answers.

    The unhooked model ("full") always runs, and first. A method with an open ``seed`` runs with ``seeds`` of them. A
    spec that gives its own ``keep`` runs once, at that budget. Data with boxes adds an "oracle" row per budget.

    Each prediction is appended to ``output/predictions.jsonl`` at once, and ``output/results.json``
    (:class:`~tokensieve.evaluate.Results`) is replaced after each row. The same call again continues from there.

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
        batch_size, max_new_tokens, metric, seeds, keep_means, budget_scope, prompt, processor_for_text, measure,
            examples: see :class:`~tokensieve.evaluate.plan.Settings`.

    Raises:
        Refusal: unknown method, metric or parameter; a bad budget; nothing to run.
        DataError: an image that cannot be decoded. The predictions so far are kept.
        ResumeError: ``output`` holds the predictions of another model or other settings.
        OutputError: a file cannot be written (a full disk). All lines written before are kept.
    """
    settings = Settings(
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        metric=metric,
        seeds=seeds,
        keep_means=keep_means,
        budget_scope=budget_scope,
        prompt=prompt,
        processor_for_text=processor_for_text,
        measure=measure,
        examples=examples,
    )
    return Comparison(model, processor, samples, settings, trained, loading).run(methods, keeps, output, progress)


class Comparison:
    """One model and one data set under fixed settings. Arguments as for :func:`compare`.

    Raises:
        Refusal: no samples, a placeholder in a question, or a model that cannot be compared.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Sequence[Sample],
        settings: Settings,
        trained: Any = None,
        loading: LoadOptions = DEFAULTS,
    ) -> None:
        if not samples:
            raise Refusal("no samples to compare on")
        if model.training:
            raise Refusal("the model is in training mode; call model.eval() first")
        if trained is not None and type(trained) is not type(model):
            raise Refusal(f"a {type(trained).__name__} cannot be compared with a {type(model).__name__}")
        check_texts(processor, samples, settings.prompt)
        self.model, self.trained, self.processor = model, trained, processor
        self.samples, self.settings, self.loading = samples, settings, loading
        self.text_processor = processor if settings.processor_for_text else None

    def run(
        self, methods: Sequence[str], keeps: Sequence[Budget], output: Path, progress: Progress | None = None
    ) -> list[Row]:
        """Fill the table row by row and save it after each."""
        entries = self._entries(methods, keeps)
        journal = Journal(output, self._journal_setup())
        example_samples = choose(self.samples, self.settings.examples)
        table = Table(self.samples, METRICS[self.settings.metric], store(example_samples, output))
        machine = environment(self.model)
        runners = [
            _Runner(self, model, {sample.id for sample in example_samples}, journal, machine)
            for model in (self.model, self.trained)
            if model is not None
        ]
        report = _Progress(progress, len(self.samples) * sum(len(entry.runs) for entry in entries))
        for entry in entries:
            runner = runners[entry.trained]
            answers = [runner.answers(run, entry.keep, report) for run in entry.runs]
            table.add(entry, answers, runner.cost(entry) if self.settings.measure else None)
            results = table.results(complete=entry is entries[-1], environment=machine, settings=self._facts())
            results.save(output / RESULTS)
        return table.rows

    def _entries(self, methods: Sequence[str], keeps: Sequence[Budget]) -> list[Entry]:
        """Return the rows to run. A method that this model cannot run is refused here, before anything runs."""
        oracle = self.model.can_generate() and any(sample.boxes for sample in self.samples)
        full, *others = self.settings.plan(methods, keeps, oracle=oracle)
        for run in (run for entry in (full, *others) for run in entry.runs if run.stages):
            self.attached(self.model, run)(self.samples[:1]).detach()
        if self.trained is not None:
            others = [row for entry in others for row in (entry, entry.fine_tuned())]
        return [full, *others]

    def attached(self, model: Any, run: Run) -> Attached:
        """Attach the methods of a run to one of the models."""
        return attaching(model, run.stages, self.text_processor, self.settings.budget_scope)

    def _journal_setup(self) -> dict[str, Any]:
        """Return all that two calls must have in common to share predictions."""
        trained = {} if self.trained is None else {"trained": model_identity(self.trained)}
        versions = {"tokensieve": __version__, "processor": processor_identity(self.processor)}
        return versions | self.settings.prediction_setup() | model_identity(self.model) | trained

    def _facts(self) -> dict[str, Any]:
        """Return the settings as the report shows them."""
        names = ("metric", "seeds", "keep_means", "budget_scope", "batch_size")
        about: dict[str, Any] = {"model": model_name(self.model), "samples": len(self.samples)}
        if loaded := loading_facts(self.model, self.loading):
            about["loading"] = loaded
        return self.settings.prediction_setup() | about | {name: getattr(self.settings, name) for name in names}


class _Runner:
    """Answers and costs of the runs on one of the models, read from the journal or produced and appended to it."""

    def __init__(
        self, comparison: Comparison, model: Any, examples: set[str], journal: Journal, machine: dict[str, Any]
    ) -> None:
        samples, settings = comparison.samples, comparison.settings
        answering = Answerer if model.can_generate() else Classifier
        self.comparison, self.journal = comparison, journal
        self.answerer = answering(model, comparison.processor, samples, settings, examples)
        # costs are reused on an equal machine only, whatever the date
        text = json.dumps({**machine, "date": ""}, sort_keys=True)
        self.machine_digest = hashlib.sha256(text.encode()).hexdigest()[:8]

    def answers(self, run: Run, keep: Budget | None, report: _Progress) -> dict[str, Answer]:
        """Complete one run in the journal and return its answers by sample id."""
        answerer, journal = self.answerer, self.journal
        if run.stages:
            attached = self.comparison.attached(answerer.model, run)
        else:
            attached = replaying(answerer.model, partial(self._oracle_decision, keep))
        done = answerer.finished(journal.answers.get(run.key, {}))
        report(run.key, len(done))
        try:
            for answers in answerer.run(attached, done):
                # a batch is answered whole; its answers from an earlier call stay as they are
                new = [answer for answer in answers if answer.sample not in done]
                journal.add(run.key, new)
                report(run.key, len(new))
        except DataError as error:
            raise DataError(f"{error}; the answers so far are kept in {journal.path}") from error
        return answerer.by_id(journal.answers[run.key])

    def cost(self, entry: Entry) -> Cost:
        """Return the cost of a row, measured once per machine on its first run and the first sample."""
        run, sample = entry.runs[0], self.comparison.samples[0]
        name = f"{run.key} @{self.machine_digest}"
        if name not in self.journal.costs:
            if run.key == FULL:
                cost = self._bench.full
            else:
                cost = self._bench.cost(run.stages or [[self._oracle_decision(entry.keep, sample)]])
            self.journal.add_cost(name, cost.to_json())
        return Cost.from_json(self.journal.costs[name])

    @cached_property
    def _bench(self) -> Bench:
        comparison, inputs = self.comparison, self.answerer.inputs(self.comparison.samples[:1])
        scope = comparison.settings.budget_scope
        return Bench(self.answerer.model, inputs, processor=comparison.text_processor, budget_scope=scope)

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
