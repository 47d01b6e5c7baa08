"""Answers and costs to the rows of the table, their comparison with random, and the example images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokensieve.errors import OutputError
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Answer
from tokensieve.evaluate.plan import Entry, is_random_baseline
from tokensieve.evaluate.results import Example, Results, Row, TypeScore, VsRandom
from tokensieve.evaluate.scoring import Metric, Scores, by_type, difference, interval, score
from tokensieve.measure import Cost

MB = 1e6
SIMILAR = 1.2  # a row is compared with random runs that have at most so many times its tokens, or as many times fewer
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
        self.samples, self.metric, self.examples = samples, metric, tuple(examples)
        self.rows: list[Row] = []
        self._types: list[tuple[TypeScore, ...]] = []
        self._differences: list[tuple[float, float, float]] = []
        self._scores: list[Scores] = []
        self._random_rows: list[int] = []
        self._vs_random: dict[tuple[int, int], VsRandom] = {}

    def add(self, entry: Entry, runs: Sequence[Mapping[str, Answer]]) -> None:
        """Add a row, not measured yet: ``runs`` hold the answers by sample id, one mapping per seed."""
        answers = [[run[sample.id] for sample in self.samples] for run in runs]
        scores = score(self.metric, self.samples, [[answer.text for answer in run] for run in answers])
        stages = entry.runs[0].stages
        if len(stages) == 1 and is_random_baseline(stages[0].info):
            self._random_rows.append(len(self.rows))
        self._scores.append(scores)
        low, high = interval(scores)
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
            )
        )
        self._types.append(by_type(self.samples, scores))
        self._differences.append(difference(scores, self._scores[0]))
        self.examples = tuple(_with_row(example, entry, runs[0][example.id]) for example in self.examples)

    def add_costs(self, costs: Sequence[Cost]) -> None:
        """Complete all rows with their costs, which come from one session."""
        self.rows = [replace(row, **_measured(cost)) for row, cost in zip(self.rows, costs, strict=True)]

    def results(self, *, complete: bool, environment: dict[str, Any], settings: dict[str, Any]) -> Results:
        """Return everything so far."""
        return Results(
            complete=complete,
            environment=environment,
            settings=settings,
            rows=tuple(self.rows),
            types=tuple(self._types),
            differences=tuple(self._differences),
            chances=tuple(self._compared_with_random(number) for number in range(len(self.rows))),
            examples=self.examples,
        )

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
        # results are saved after every row; a bootstrap of earlier rows need not run again
        if (number, nearest) not in self._vs_random:
            random = self.rows[nearest]
            paired = difference(self._scores[number], self._scores[nearest])
            self._vs_random[number, nearest] = VsRandom(random.tokens_average, random.accuracy, *paired)
        return self._vs_random[number, nearest]


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
        examples.append(Example(sample.id, name, sample.question, sample.answers, ()))
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
        "reductions": [answer.reduction],
    }
    return replace(example, kept=(*example.kept, row))
