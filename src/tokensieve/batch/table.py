"""The table of ``compare`` from the answers of a batch whose data hold right answers."""

from __future__ import annotations

import json
from pathlib import Path

from tokensieve.batch.job import Job
from tokensieve.batch.parts import AnswerRow, Format, Output
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Answer
from tokensieve.evaluate.metrics import METRICS, check_answers
from tokensieve.evaluate.referee import referee
from tokensieve.evaluate.results import RESULTS, Results, Skipped
from tokensieve.evaluate.rows import FULL
from tokensieve.evaluate.table import Table
from tokensieve.loading import without_folder


def results(job: Job, folder: Path, file_format: Format = "jsonl") -> Results | None:
    """Return the results of a finished batch, also written to ``results.json``.

    Return ``None`` if "full", which the methods are compared with, is not among them, or no row has right answers.
    Rows that some method has no answer to are skipped in all.

    Raises:
        DataError: right answers that the metric cannot read.
    """
    entries = job.entries()
    if entries[0].runs[0].key != FULL:
        return None
    output = Output(folder, file_format, job.setup(file_format))
    samples: dict[str, Sample] = {}
    skipped: dict[str, Skipped] = {}
    answers: dict[str, dict[str, Answer]] = {run.key: {} for run in job.runs()}
    for row in output.read_all(job.parts()):
        if row.error is not None:
            skipped[row.source] = Skipped(row.id, row.source, row.error)
        elif row.answers is not None:
            samples.setdefault(row.source, _sample(row))
            answers[row.method][row.source] = _answer(row)
    scored = [sample for source, sample in samples.items() if source not in skipped]
    if not scored:
        return None
    check_answers(job.settings.metric, scored)
    table = Table(scored, METRICS[job.settings.metric], [])
    for entry in entries:
        table.add(entry, [answers[run.key] for run in entry.runs])
    settings = job.settings
    facts = {name: getattr(settings, name) for name in ("metric", "seeds", "keep_means", "batch_size")}
    about = {"model": without_folder(job.model), "samples": len(scored), **settings.prediction_setup(), **facts}
    if loaded := job.loading.to_json():
        about["loading"] = loaded
    environment = folder / "environment.json"
    machine = json.loads(environment.read_text("utf-8")) if environment.exists() else {}
    unexamined = table.results(complete=True, environment=machine, settings=about, skipped=list(skipped.values()))
    table_results = referee(unexamined)
    table_results.save(folder / RESULTS)
    return table_results


def _sample(row: AnswerRow) -> Sample:
    images = tuple(Path(name) for name in row.images or ())
    image = images[0] if len(images) == 1 else images
    return Sample(row.source, image, row.source, row.answers or (), row.type or "", (), row.source, row.choices or ())


def _answer(row: AnswerRow) -> Answer:
    after = row.tokens_after or 0
    before = after if row.tokens_before is None else row.tokens_before
    average = float(after) if row.tokens_average is None else row.tokens_average
    return Answer(row.source, row.answer or "", before, after, average)
