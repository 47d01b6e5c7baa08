"""Run a data set through many methods and budgets, resumably."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokensieve.budget import Budget
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.results import Row

Progress = Callable[[int, int, str], None]


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
    prompt: str = "{question}",
    processor_for_text: bool = True,
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
        model: a vision-language model with nothing attached, in eval mode on its device.
        processor: its processor.
        samples: see :func:`~tokensieve.evaluate.data.load_data`.
        methods: method specs.
        keeps: budgets: ints are tokens per image, floats in (0, 1] shares.
        output: folder, made if need be.
        batch_size: questions per forward.
        max_new_tokens: longest answer.
        metric: a name in :data:`~tokensieve.evaluate.metrics.METRICS`.
        seeds: runs of a method with an open ``seed``.
        prompt: what the user says; ``{question}`` is replaced.
        processor_for_text: give ``attach`` the processor, so that text-informed methods see the user's words only.
        measure: also measure FLOPs, latency and memory, on the first sample alone.
        examples: images whose kept tokens are recorded for the report.
        progress: called with (questions done, questions in all, what is running).

    Raises:
        ValueError: unknown method, metric or parameter; a bad budget; nothing to run.
        DataError: an image that cannot be decoded. What was predicted before is kept.
        ResumeError: ``output`` holds the predictions of another model or other settings.
        OutputError: nothing more can be written (a full disk). What was written before is kept.
    """
    raise NotImplementedError
