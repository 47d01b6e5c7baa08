"""All that decides the answers of a batch: the model, the data, the methods and the prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tokensieve.batch.source import Columns, Part, Row, fingerprint, parts_of, read_part
from tokensieve.budget import Budget
from tokensieve.errors import DataError
from tokensieve.evaluate.journal import Answer
from tokensieve.evaluate.metrics import check_answers
from tokensieve.evaluate.plan import Entry, Run, Settings
from tokensieve.evaluate.rows import FULL
from tokensieve.loading import DEFAULTS, LoadOptions, find, without_folder
from tokensieve.version import __version__

Engine: TypeAlias = Literal["transformers", "vllm"]
Outcome: TypeAlias = Answer | str
"""An answer, or the reason why there is none."""


@dataclass(frozen=True)
class Job:
    """One batch, as it is sent to every worker.

    Attributes:
        model: folder or hub name; "reference" is the bundled one.
        data: a file, a folder of shards, a pattern, or "reference".
        methods: method specs; "full" is the model without a method.
        keeps: budgets for the specs that leave theirs open.
        settings: batch size, longest answer, prompt, budget scope and metric.
        rows_per_part: rows that are read, answered and written together.
    """

    model: str
    data: str
    methods: tuple[str, ...]
    keeps: tuple[Budget, ...] = ()
    settings: Settings = field(default_factory=lambda: Settings(seeds=1, measure=False))
    columns: Columns = field(default_factory=Columns)
    loading: LoadOptions = DEFAULTS
    engine: Engine = "transformers"
    fetch_images: bool = False
    rows_per_part: int = 256

    def entries(self) -> list[Entry]:
        """Return the rows of the table: "full" first, if it is among the methods.

        Raises:
            Refusal: unknown method or parameter, bad budget.
        """
        full, *others = self.settings.plan(self.methods, self.keeps)
        return [full, *others] if any(spec.strip() == FULL for spec in self.methods) else others

    def runs(self) -> list[Run]:
        """Return what answers each row: every method at every budget, and with every seed."""
        return list({run.key: run for entry in self.entries() for run in entry.runs}.values())

    def parts(self) -> list[Part]:
        """Return the parts of the input."""
        return parts_of(self.data, self.rows_per_part)

    def read(self, part: Part) -> list[Row]:
        """Return the rows of a part."""
        return read_part(part, self.columns, fetch_images=self.fetch_images)

    def check(self, parts: Sequence[Part]) -> None:
        """Refuse data of which no row of the first part can be read: mostly a wrong column or a wrong folder."""
        rows = self.read(parts[0])
        samples = [row.sample for row in rows if row.sample is not None]
        if not samples:
            raise DataError(f"none of the first {len(rows)} rows can be read; {rows[0].source}: {rows[0].error}")
        check_answers(self.settings.metric, [sample for sample in samples if sample.answers])

    def setup(self, file_format: str) -> dict[str, Any]:
        """Return all that two calls must have in common to share an output folder, as JSON has it."""
        facts = {
            "tokensieve": __version__,
            "model": without_folder(self.model),
            "weights": _folder_digest(self.model, self.loading.revision),
            "loading": self.loading.to_json(),
            "engine": self.engine,
            "data": [without_folder(self.data), fingerprint(self.data)],
            "columns": vars(self.columns),
            "fetch_images": self.fetch_images,
            "methods": [run.key for run in self.runs()],
            "rows_per_part": self.rows_per_part,
            "format": file_format,
            **self.settings.prediction_setup(),
        }
        as_json: dict[str, Any] = json.loads(json.dumps(facts, default=str))
        return as_json


def _folder_digest(model: str, revision: str | None) -> str:
    """Return a digest of names, sizes and times of the files of a model's folder; "" for a model on the hub."""
    folder = Path(find(model, revision).path)
    if not folder.is_dir():
        return ""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    listed = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
