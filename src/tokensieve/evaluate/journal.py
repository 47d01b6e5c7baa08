"""Predictions on disk, appended line by line, so that an interrupted comparison can continue."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokensieve.errors import OutputError, ResumeError
from tokensieve.evaluate.results import Skipped
from tokensieve.jsonl import append_lines, complete_lines

NAME = "predictions.jsonl"
FORMAT = 2  # of the lines and of the samples' keys; a file of another format cannot be continued


@dataclass(frozen=True)
class Answer:
    """The model's answer to one sample in one run.

    Attributes:
        sample: key of the sample (see :func:`tokensieve.evaluate.provenance.sample_key`).
        text: the answer.
        before, after: visual tokens of the sample's image.
        average: its visual tokens averaged over the layers of the LLM.
        grid: (height, width) of the tokens before, if they form one.
        reduction: the decision as JSON, recorded for a few examples only.
    """

    sample: str
    text: str
    before: int
    after: int
    average: float
    grid: tuple[int, int] | None = None
    reduction: dict[str, Any] | None = None


class Journal:
    """``predictions.jsonl``: a header with the set-up, then one line per answer, skipped sample or cost.

    Args:
        folder: the file's folder, created if it is missing.
        setup: properties that all predictions in the file share.

    Attributes:
        answers: {run: {sample: answer}}.
        skipped: {sample: why it is skipped in every run}.
        costs: {session: costs of its rows as JSON}.
        writes: whether additions go to the file; set it to ``False`` in copies for other processes.

    Raises:
        ResumeError: the file was written under another set-up, or is not a file of predictions.
        OutputError: the file cannot be written.
    """

    def __init__(self, folder: Path, setup: dict[str, Any]) -> None:
        self.path, self.setup, self.writes = folder / NAME, {"format": FORMAT} | setup, True
        self.answers: dict[str, dict[str, Answer]] = {}
        self.skipped: dict[str, Skipped] = {}
        self.costs: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = complete_lines(self.path)
        except OSError as error:
            raise OutputError(f"cannot use the output folder {folder}: {error.strerror or error}") from error
        if lines:
            self._check(lines[0])
            for number, line in enumerate(lines[1:], 2):
                self._read(number, line)
        else:
            self._append([{"setup": self.setup}])

    def add(self, run: str, answers: Sequence[Answer]) -> None:
        """Append answers of a run."""
        self.answers.setdefault(run, {}).update({answer.sample: answer for answer in answers})
        lines = [{"run": run} | {k: v for k, v in asdict(answer).items() if v is not None} for answer in answers]
        self._append(lines)

    def skip(self, samples: Mapping[str, Skipped]) -> None:
        """Append samples that no run can answer, by their keys."""
        self.skipped.update(samples)
        self._append([{"skipped": key} | asdict(skipped) for key, skipped in samples.items()])

    def add_cost(self, run: str, cost: dict[str, Any]) -> None:
        """Append the costs of a session."""
        self.costs[run] = cost
        self._append([{"run": run, "cost": cost}])

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        if not self.writes or not lines:
            return
        append_lines(self.path, lines)

    def _check(self, header: bytes) -> None:
        try:
            recorded = json.loads(header)["setup"]
        except (ValueError, KeyError, TypeError):
            raise ResumeError(f"{self.path} is not a file of predictions; choose another output folder") from None
        setup = json.loads(json.dumps(self.setup))  # as JSON reads it back: tuples are lists
        if recorded != setup:
            changed = sorted(key for key in recorded.keys() | setup.keys() if recorded.get(key) != setup.get(key))
            raise ResumeError(
                f"{self.path} holds predictions of another set-up ({', '.join(changed)} differ); "
                "choose another output folder, or delete the file to start anew"
            )

    def _read(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            if "skipped" in row:
                key = row.pop("skipped")
                self.skipped[key] = Skipped(**row)
                return
            run = row.pop("run")
            if "cost" in row:
                self.costs[run] = row["cost"]
                return
            answer = Answer(**{**row, "grid": tuple(row["grid"]) if "grid" in row else None})
            self.answers.setdefault(run, {})[answer.sample] = answer
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ResumeError(f"{self.path}, line {number}: cannot be read; delete the line or the file") from None
