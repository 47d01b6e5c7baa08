"""Run a data set through many methods and budgets, resumably."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from tokensieve.budget import Budget, Scope
from tokensieve.engine import attach
from tokensieve.errors import DataError, Refusal
from tokensieve.evaluate.answer import Answerer, Attached, Classifier, attaching, replaying
from tokensieve.evaluate.costs import Costs
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Journal
from tokensieve.evaluate.oracle import oracle
from tokensieve.evaluate.plan import Convention, Run, plan
from tokensieve.evaluate.prompt import check_texts
from tokensieve.evaluate.provenance import environment, model_identity, model_name
from tokensieve.evaluate.results import Row
from tokensieve.evaluate.scoring import METRICS
from tokensieve.evaluate.table import Table, choose, store
from tokensieve.methods.registry import nearest
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
    budget: Convention = "kept",
    budget_scope: Scope = "image",
    prompt: str = "{question}",
    processor_for_text: bool = True,
    trained: Any = None,
    measure: bool = True,
    examples: int = 4,
    progress: Progress | None = None,
) -> list[Row]:
    """Answer every sample with every method at every budget, greedily, and score it.

    ``full`` (the unhooked model) always runs, and first. A method that takes a seed runs with ``seeds`` of them. A spec
    that gives its own ``keep`` runs once, at that. Data with boxes adds an ``oracle`` row per budget.

    Each prediction is appended to ``output/predictions.jsonl`` as it comes, and ``output/results.json``
    (:class:`~tokensieve.evaluate.results.Results`) is replaced after each row; the same call again continues.

    Args:
        model: a vision-language model with nothing attached, in eval mode on its device; or a cross-modal encoder that
            classifies answers (a ViLT or METER for question answering), which gets no oracle row.
        processor: its processor.
        samples: see :func:`~tokensieve.evaluate.data.load_data`.
        methods: method specs.
        keeps: budgets: ints are tokens per image, floats in (0, 1] shares.
        output: folder, made if need be.
        batch_size: questions per forward.
        max_new_tokens: longest answer.
        metric: a name in :data:`~tokensieve.evaluate.scoring.METRICS`.
        seeds: runs of a method with an open ``seed``.
        budget: whether ``keeps`` count the tokens "kept" in the end or, for methods inside the LLM, on "average" over
            its blocks; the rows always tell both.
        budget_scope: what ``keeps`` are for, as for ``attach``.
        prompt: what the user says; ``{question}`` is replaced.
        processor_for_text: give ``attach`` the processor, so that text-informed methods see the user's words only.
        trained: the same model fine-tuned with reducers on. Each method then has a second row, "… fine-tuned", on it.
        measure: also measure FLOPs, latency and memory, on the first sample alone.
        examples: images whose kept tokens are recorded for the report.
        progress: called with (questions done, questions in all, what is running).

    Raises:
        ValueError: unknown method, metric or parameter; a bad budget; nothing to run.
        DataError: an image that cannot be decoded. What was predicted before is kept.
        ResumeError: ``output`` holds the predictions of another model or other settings.
        OutputError: nothing more can be written (a full disk). What was written before is kept.
    """
    _check(model, samples, metric, batch_size, prompt)
    check_texts(processor, samples, prompt)
    oracle = model.can_generate() and any(sample.boxes for sample in samples)
    entries = plan(methods, keeps, seeds=seeds, oracle=oracle, budget=budget)
    if trained is not None:
        if type(trained) is not type(model):
            raise Refusal(f"a {type(trained).__name__} cannot be compared with a {type(model).__name__}")
        full, *others = entries
        entries = [full, *(both for entry in others for both in (entry, entry.fine_tuned()))]
    words = processor if processor_for_text else None
    for run in (run for entry in entries for run in entry.runs if run.stages):
        # what this model cannot run is refused before it starts
        attach(model, run.stages, processor=words, budget_scope=budget_scope).detach()

    setup = {"prompt": prompt, "max_new_tokens": max_new_tokens, "processor_for_text": processor_for_text}
    if budget_scope != "image":
        setup["budget_scope"] = budget_scope
    identity = model_identity(model) | ({} if trained is None else {"trained": model_identity(trained)})
    journal = Journal(output, {"tokensieve": __version__, **setup, **identity})
    shown = choose(samples, examples)
    table = Table(samples, METRICS[metric], store(shown, output))
    answering = Answerer if model.can_generate() else Classifier
    answerers = [
        answering(
            each,
            processor,
            samples,
            prompt=prompt,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            examples={sample.id for sample in shown},
        )
        for each in (model, trained)
        if each is not None
    ]
    place = environment(model)
    measured = answerers if measure else []
    costs = [Costs(a.model, words, partial(a.inputs, samples[:1]), journal, place, budget_scope) for a in measured]
    settings = setup | {"model": model_name(model), "samples": len(samples), "metric": metric, "seeds": seeds}
    settings |= {"budget": budget, "budget_scope": budget_scope, "batch_size": batch_size}
    report = _Progress(progress, len(samples) * sum(len(entry.runs) for entry in entries))
    for entry in entries:
        answerer = answerers[entry.trained]
        decide = partial(_oracle, answerer, journal, entry.keep)
        for run in entry.runs:
            body = answerer.model
            attached = attaching(body, run.stages, words, budget_scope) if run.stages else replaying(body, decide)
            _answer(answerer, journal, run, attached, report)
        first = entry.runs[0]
        stages = first.stages or [[decide(samples[0])]]
        cost = costs[entry.trained].of(first.key, stages) if measure else None
        table.add(entry, [answerer.by_id(journal.answers[run.key]) for run in entry.runs], cost)
        table.results(complete=entry is entries[-1], environment=place, settings=settings).save(output / RESULTS)
    return table.rows


def _check(model: Any, samples: Sequence[Sample], metric: str, batch_size: int, prompt: str) -> None:
    if metric not in METRICS:
        raise Refusal(f"unknown metric {metric!r}; {nearest(metric, list(METRICS))}")
    if not samples:
        raise Refusal("no samples to compare on")
    if batch_size < 1:
        raise Refusal(f"batch_size must be at least 1; got {batch_size}")
    if "{question}" not in prompt:
        raise Refusal(f"the prompt must contain {{question}}; got {prompt!r}")
    if model.training:
        raise Refusal("the model is in training mode; call model.eval() first")


def _answer(answerer: Answerer, journal: Journal, run: Run, attached: Attached, report: _Progress) -> None:
    """Complete one run in the journal."""
    done = answerer.finished(journal.answers.get(run.key, {}))
    report(run.key, len(done))
    try:
        for answers in answerer.run(attached, done):
            new = [answer for answer in answers if answer.sample not in done]
            journal.add(run.key, new)
            report(run.key, len(new))
    except DataError as error:
        raise DataError(f"{error}; the answers so far are kept in {journal.path}") from error


def _oracle(answerer: Answerer, journal: Journal, keep: Budget | None, sample: Sample) -> Reduction:
    """The oracle's decision for a sample, on the grid that an earlier run found."""
    assert keep is not None
    key = answerer.keys[sample.id]
    grids = (answers[key].grid for answers in journal.answers.values() if key in answers)
    total = journal.answers["full"][key].before
    return oracle(sample.boxes, sample.open().size, total, next(filter(None, grids), None), keep)


class _Progress:
    """Adds up what is done for the caller's callback."""

    def __init__(self, callback: Progress | None, total: int) -> None:
        self.callback, self.total, self.done = callback, total, 0

    def __call__(self, label: str, more: int) -> None:
        self.done += more
        if self.callback is not None:
            self.callback(self.done, self.total, label)
