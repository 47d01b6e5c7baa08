"""Answers and costs to the rows of the table, their comparison with random, and the example images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokensieve.errors import OutputError
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.intervals import Clusters, Scores, interval, paired_difference
from tokensieve.evaluate.journal import Answer
from tokensieve.evaluate.metrics import Metric, answers_for, says_yes, yes_no
from tokensieve.evaluate.pictures import Picture, content_key
from tokensieve.evaluate.plan import Entry, is_random_baseline
from tokensieve.evaluate.referee import SIMILAR
from tokensieve.evaluate.results import Example, Question, Results, Skipped
from tokensieve.evaluate.rows import BLIND, Row, TypeScore, VsRandom, YesNo
from tokensieve.evaluate.verdict import Overlap, Verdict
from tokensieve.measure import Cost

MB = 1e6
SPREADS = ("prefill_ms", "prefill_speedup", "method_ms", "decode_ms_per_token", "decode_speedup")
FOLDER = "examples"
LARGEST = 512  # px, longer side of a stored image


class Table:
    """The results so far, filled row by row; the row of the full model must come first.

    Args:
        samples: the data set.
        metric: scores an answer.
        examples: images to show; each added row extends their ``kept``.
    """

    def __init__(self, samples: Sequence[Sample], metric: Metric, examples: Sequence[Example]) -> None:
        self.samples, self.metric = samples, metric
        self.rows: list[Row] = []
        self._answers = {s.id: answers_for(metric, s) for s in samples}
        self.examples = tuple(replace(example, answers=self._answers[example.id]) for example in examples)
        self._clusters = clusters(samples)
        self._positive = np.array([says_yes(s.answers[0]) for s in samples]) if metric is yes_no else None
        self.questions = tuple(
            Question(s.id, s.type, cluster, None if self._positive is None else bool(self._positive[i]))
            for i, (s, cluster) in enumerate(zip(samples, self._clusters.tolist(), strict=True))
        )
        self._scores: list[Scores] = []
        self._random_rows: list[int] = []
        self._vs_random: dict[tuple[int, int], VsRandom] = {}

    def add(self, entry: Entry, runs: Sequence[Mapping[str, Answer]]) -> None:
        """Add a row, not measured yet: ``runs`` hold the answers by sample id, one mapping per seed."""
        answers = [[run[sample.id] for sample in self.samples] for run in runs]
        texts = [[answer.text for answer in run] for run in answers]
        scores = np.array(
            [
                [self.metric(text, self._answers[s.id]) for text, s in zip(run, self.samples, strict=True)]
                for run in texts
            ]
        )
        stages = entry.runs[0].stages
        if len(stages) == 1 and is_random_baseline(stages[0].info):
            self._random_rows.append(len(self.rows))
        self._scores.append(scores)
        low, high = interval(scores, self._clusters)
        all_answers = [answer for run in answers for answer in run]
        self.rows.append(
            Row(
                method=entry.method,
                keep=entry.keep,
                tokens_before=sum(answer.before for answer in all_answers) / len(all_answers),
                tokens_after=sum(answer.after for answer in all_answers) / len(all_answers),
                tokens_average=sum(answer.average for answer in all_answers) / len(all_answers),
                samples=len(self.samples),
                accuracy=float(scores.mean()),
                accuracy_low=low,
                accuracy_high=high,
                **self._to_full(scores, np.full(len(self.samples), True)),
                types=self._by_type(scores),
                yes_no=None if self._positive is None else YesNo.of(scores, self._positive, self._clusters),
            )
        )
        self.examples = tuple(_with_row(example, entry, runs[0][example.id]) for example in self.examples)

    def add_costs(self, costs: Sequence[Cost]) -> None:
        """Complete the rows with their costs, which come from one session; the blind row, the last, has none."""
        blind = [row for row in self.rows if row.method == BLIND]
        timed = [row for row in self.rows if row.method != BLIND]
        self.rows = [replace(row, **_measured(cost)) for row, cost in zip(timed, costs, strict=True)] + blind

    def add_overlaps(self, overlaps: Sequence[Overlap | None]) -> None:
        """Complete all rows with the stability of their kept places."""
        verdicts = [None if overlap is None else Verdict(overlap=overlap) for overlap in overlaps]
        self.rows = [replace(row, referee=verdict) for row, verdict in zip(self.rows, verdicts, strict=True)]

    def results(
        self,
        *,
        complete: bool,
        environment: dict[str, Any],
        settings: dict[str, Any],
        skipped: Sequence[Skipped] = (),
    ) -> Results:
        """Return everything so far."""
        return Results(
            complete=complete,
            environment=environment,
            settings=settings,
            rows=tuple(replace(row, random=self._compared_with_random(i)) for i, row in enumerate(self.rows)),
            questions=self.questions,
            scores=tuple(tuple(map(tuple, scores.tolist())) for scores in self._scores),
            skipped=tuple(skipped),
            examples=self.examples,
        )

    def _to_full(self, scores: Scores, chosen: NDArray[np.bool_]) -> dict[str, Any]:
        """Return the fields of a comparison with full on the chosen questions; ``None`` for full itself."""
        if len(self._scores) == 1:
            return {}
        paired = paired_difference(scores[:, chosen], self._scores[0][:, chosen], self._clusters[chosen])
        return {
            "difference": paired.difference,
            "difference_low": paired.low,
            "difference_high": paired.high,
            "difference_p": paired.p,
        }

    def _by_type(self, scores: Scores) -> tuple[TypeScore, ...]:
        """Return the accuracy per question type, in order of appearance; empty if the data has no types."""
        types = np.array([question.type for question in self.questions])
        type_scores = []
        for name in filter(None, dict.fromkeys(types.tolist())):
            chosen = types == name
            part = scores[:, chosen]
            low, high = interval(part, self._clusters[chosen])
            to_full = self._to_full(scores, chosen)
            type_scores.append(TypeScore(name, part.shape[1], float(part.mean()), low, high, **to_full))
        return tuple(type_scores)

    def _compared_with_random(self, number: int) -> VsRandom | None:
        """Compare a row with the random row that has the most similar number of tokens."""
        if number == 0 or number in self._random_rows or not self._random_rows:
            return None

        def token_ratio(random_row: int) -> float:
            ratio = self.rows[random_row].tokens_average / max(self.rows[number].tokens_average, 1e-9)
            return max(ratio, 1 / ratio)

        nearest = min(self._random_rows, key=token_ratio)
        if token_ratio(nearest) > SIMILAR:
            return None
        # results are saved after every row; the comparisons of earlier rows need not run again
        if (number, nearest) not in self._vs_random:
            random = self.rows[nearest]
            paired = paired_difference(self._scores[number], self._scores[nearest], self._clusters)
            self._vs_random[number, nearest] = VsRandom(
                random.tokens_average, random.accuracy, paired.difference, paired.low, paired.high
            )
        return self._vs_random[number, nearest]


def clusters(samples: Sequence[Sample]) -> Clusters:
    """Number the images in order of appearance and return the number of each sample's image, `[samples]`.

    Images that a sample shows together share a number, directly or through further samples. Files with equal content
    are one image, whatever their names.
    """
    pictures = dict.fromkeys(image for sample in samples for image in sample.images)
    numbers_by_content: dict[Any, int] = {}
    images = {picture: numbers_by_content.setdefault(_content(picture), i) for i, picture in enumerate(pictures)}
    parents = list(range(len(pictures)))

    def first(number: int) -> int:
        while parents[number] != number:
            number = parents[number]
        return number

    for sample in samples:
        numbers = [first(images[image]) for image in sample.images]
        for number in numbers:
            parents[number] = min(numbers)
    return np.unique([first(images[sample.images[0]]) for sample in samples], return_inverse=True)[1]


def _content(picture: Picture) -> Any:
    """Return a value that equal images share: the digest of the content, where it can be read."""
    key = content_key(picture)
    return picture if key in (None, "unreadable") else key


def choose(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return one question about each of the first ``count`` images, with the question's number varied."""
    by_image: dict[Any, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(sample.image, []).append(sample)
    groups = list(by_image.values())[:count]
    return [group[i % len(group)] for i, group in enumerate(groups)]


def store(samples: Sequence[Sample], output: Path) -> list[Example]:
    """Write the images under ``output`` and return the examples, with no rows yet.

    Raises:
        DataError: an image that cannot be decoded.
        OutputError: an image that cannot be written.
    """
    examples = []
    for number, sample in enumerate(samples):
        image, name = sample.open(), f"{FOLDER}/{number}.png"
        image.thumbnail((LARGEST, LARGEST))
        try:
            (output / FOLDER).mkdir(parents=True, exist_ok=True)
            image.save(output / name)
        except OSError as error:
            raise OutputError(f"cannot write {output / name}: {error.strerror or error}") from error
        count = len(sample.images)
        question = sample.text if count == 1 else f"{sample.text} (the first of {count} images is shown)"
        examples.append(Example(sample.id, name, question, sample.answers, ()))
    return examples


def _measured(cost: Cost) -> dict[str, Any]:
    """Return the measured fields of a row."""
    fields: dict[str, Any] = {
        "flops_ratio": cost.flops_ratio,
        "peak_activation_mb": cost.peak_activation_bytes / MB,
        "kv_mb": None if cost.kv_bytes is None else cost.kv_bytes / MB,
    }
    for name in SPREADS:
        spread = getattr(cost, name)
        median, low, high = (spread.median, spread.low, spread.high) if spread else (None, None, None)
        fields |= {name: median, f"{name}_low": low, f"{name}_high": high}
    for name in ("break_even", "break_even_tokens", "break_even_low", "break_even_high", "timing_note"):
        fields[name] = getattr(cost, name)
    return fields


def _with_row(example: Example, entry: Entry, answer: Answer) -> Example:
    row = {
        "method": entry.method,
        "keep": entry.keep,
        "prediction": answer.text,
        "reductions": [] if answer.reduction is None else [answer.reduction],  # the blind row has no tokens to show
    }
    return replace(example, kept=(*example.kept, row))
