"""Predictions on disk, appended line by line, so that an interrupted comparison can continue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokensieve.errors import OutputError, ResumeError

NAME = "predictions.jsonl"


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
    """``predictions.jsonl``: a header with the set-up, then one line per answer or cost.

    Args:
        folder: the file's folder, created if it is missing.
        setup: properties that all predictions in the file share.

    Attributes:
        answers: {run: {sample: answer}}.
        costs: {session: costs of its rows as JSON}.

    Raises:
        ResumeError: the file was written under another set-up, or is not a file of predictions.
        OutputError: the file cannot be written.
    """

    def __init__(self, folder: Path, setup: dict[str, Any]) -> None:
        self.path, self.setup = folder / NAME, setup
        self.answers: dict[str, dict[str, Answer]] = {}
        self.costs: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self._complete_lines()
        except OSError as error:
            raise OutputError(f"cannot use the output folder {folder}: {error.strerror or error}") from error
        if lines:
            self._check(lines[0])
            for number, line in enumerate(lines[1:], 2):
                self._read(number, line)
        else:
            self._append([{"setup": setup}])

    def add(self, run: str, answers: Sequence[Answer]) -> None:
        """Append answers of a run."""
        self.answers.setdefault(run, {}).update({answer.sample: answer for answer in answers})
        lines = [{"run": run} | {k: v for k, v in asdict(answer).items() if v is not None} for answer in answers]
        self._append(lines)

    def add_cost(self, run: str, cost: dict[str, Any]) -> None:
        """Append the costs of a session."""
        self.costs[run] = cost
        self._append([{"run": run, "cost": cost}])

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            with self.path.open("ab") as file:
                file.write(text.encode())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror or error}; what was written before is kept, "
                "and the same call continues from there"
            ) from error

    def _complete_lines(self) -> list[bytes]:
        """Return the complete lines. An incomplete last line, left by a crash or a full disk, is cut off the file."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        # only a file of predictions is ever shortened: a foreign file is refused later, unchanged
        if len(whole) < len(data) and (not whole or whole.startswith(b'{"setup"')):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return whole.splitlines()

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
            run = row.pop("run")
            if "cost" in row:
                self.costs[run] = row["cost"]
                return
            answer = Answer(**{**row, "grid": tuple(row["grid"]) if "grid" in row else None})
        except (ValueError, KeyError, TypeError):
            raise ResumeError(f"{self.path}, line {number}: cannot be read; delete the line or the file") from None
        self.answers.setdefault(run, {})[answer.sample] = answer
