"""Calibration of an average over the data: find the threshold at which the counts of some images have that average."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tokensieve.budget import BudgetRule, count, rule_of
from tokensieve.engine import attach
from tokensieve.errors import OutputError, Refusal
from tokensieve.evaluate.answer import unreadable
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.processes import Processes
from tokensieve.evaluate.prompt import check_texts, encode
from tokensieve.loading import to_model
from tokensieve.methods import Method
from tokensieve.methods.adaptive import cut, threshold_for
from tokensieve.methods.spec_file import SpecFile

IMAGES = 50  # of a calibration
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class AverageCalibration:
    """The result of a calibration.

    Attributes:
        method: the stages with the threshold in their budget.
        keep: the budget with its threshold, such as "average:64:gain:0.0123"; ``threshold``: that number.
        wanted, mean: tokens per image that were asked for, and that these images keep.
        fewest, most: tokens of an image among them.
        images: number of images.
        samples: ids of the samples that show them.
    """

    method: str
    keep: str
    threshold: float
    wanted: float
    mean: float
    fewest: int
    most: int
    images: int
    samples: tuple[str, ...]

    def save(self, path: str | Path) -> None:
        """Write a spec file, which ``attach`` and every command read; raise :class:`OutputError` if that fails."""
        file = SpecFile(self.method, evidence=asdict(self))
        try:
            Path(path).write_text(json.dumps(file.to_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def uncalibrated(stages: Sequence[Method]) -> BudgetRule | None:
    """Return the average over the data that still needs a threshold; ``None`` if there is none."""
    rules = (rule_of(method.budget) for method in stages)
    return next((rule for rule in rules if rule and rule.mean == "average" and rule.threshold is None), None)


def one_per_image(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """Return one sample for each image, at most ``limit``, spread over the data."""
    first: dict[Any, Sample] = {}
    for sample in samples:
        first.setdefault(sample.image, sample)
    distinct = list(first.values())
    chosen = min(limit, len(distinct))
    return [distinct[number * len(distinct) // chosen] for number in range(chosen)]


@torch.inference_mode()
def calibrate_average(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    stages: Sequence[Method],
    *,
    prompt: str = "{question}",
    text_processor: Any = None,
    progress: Progress | None = None,
) -> AverageCalibration:
    """Find the threshold of an average over the data: one prefill per sample.

    Answers are not read. Questions are read by methods that rank by the user's words alone.

    Args:
        samples: one per image.
        stages: methods, one of them with a budget such as "average:64".
        prompt: text of the user turn; ``{question}`` is replaced.
        text_processor: as ``processor`` of ``attach``.
        progress: called with (done, total, current sample).

    Raises:
        Refusal: no samples, no such budget, or an average that these images cannot have.
    """
    rule = uncalibrated(stages)
    if not samples or rule is None:
        raise Refusal("calibration needs at least one sample and a budget such as keep='average:64'")
    check_texts(processor, samples, prompt)
    trial = with_threshold(stages, 0.0)
    curves: list[list[float]] = []
    totals: list[int] = []
    with attach(model, trial, processor=text_processor) as sieve:
        for number, sample in enumerate(samples):
            if progress is not None:
                progress(number, len(samples), sample.id)
            inputs = to_model(model, encode(processor, [sample], prompt=prompt))
            model(**inputs, use_cache=False, logits_to_keep=1)
            curves += sieve.curves  # type: ignore[attr-defined]  # of an LlmSieve
            totals += sieve.curve_totals  # type: ignore[attr-defined]
    threshold = threshold_for(rule, curves, totals)
    counts = [cut(curve, threshold, rule.wanted, total) for curve, total in zip(curves, totals, strict=True)]
    return AverageCalibration(
        method=" + ".join(map(str, with_threshold(stages, threshold))),
        keep=str(replace(rule, threshold=threshold)),
        threshold=threshold,
        wanted=sum(count(rule.wanted, total) for total in totals) / len(totals),
        mean=sum(counts) / len(counts),
        fewest=min(counts),
        most=max(counts),
        images=len(counts),
        samples=tuple(sample.id for sample in samples),
    )


@dataclass
class Thresholds:
    """The thresholds of one comparison, each found on up to 50 of its images when a row needs it.

    Attributes:
        model, processor, samples, prompt, text_processor: as for :func:`calibrate_average`.
        processes: all use the thresholds of the first.
        known: by rule and the stages that it depends on: for "gain" and "rank", those before the connector stage.
    """

    model: Any
    processor: Any
    samples: Sequence[Sample]
    prompt: str
    text_processor: Any
    processes: Processes
    known: dict[str, float] = field(default_factory=dict)

    def fill_in(self, stages: Sequence[Method]) -> Sequence[Method]:
        """Return the stages of a run with the threshold that is missing, if one is."""
        rule = uncalibrated(stages)
        if rule is None:
            return stages
        relevant = [str(stage) for stage in stages if rule.criterion == "mass" or stage.info.stage == "encoder"]
        key = f"{rule} {relevant}"
        if key not in self.known:
            chosen = one_per_image(self.samples, IMAGES)
            damaged = unreadable(chosen)
            samples = [sample for sample in chosen if sample.id not in damaged]
            texts = {"prompt": self.prompt, "text_processor": self.text_processor}
            result = calibrate_average(self.model, self.processor, samples, stages, **texts)
            self.known[key] = self.processes.exchange(result.threshold)[0]
        return with_threshold(stages, self.known[key])


def with_threshold(stages: Sequence[Method], threshold: float) -> list[Method]:
    """Return the stages with this threshold in the place of a missing one."""
    rules = [uncalibrated([method]) for method in stages]
    return [
        method if rule is None else method.with_budget(str(replace(rule, threshold=threshold)))
        for method, rule in zip(stages, rules, strict=True)
    ]
