"""Comparisons in the background of the page, and the reports in its folder."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from tokensieve.budget import Budget
from tokensieve.demo.run import Workbench, check_number
from tokensieve.errors import DataError, Refusal
from tokensieve.evaluate import load_data
from tokensieve.evaluate.compare import Comparison
from tokensieve.evaluate.data import types_known_to
from tokensieve.evaluate.plan import Settings
from tokensieve.loading import DEFAULTS, LoadOptions
from tokensieve.report.extra import check_report_extra
from tokensieve.report.html import write_report
from tokensieve.report.overlay import as_seen

REPORT = "report.html"
MOST_QUESTIONS = 2000
PAUSE = 0.01  # seconds in which a waiting question takes the model


class Cancelled(Exception):
    """Ends a comparison from the outside."""


@dataclass(frozen=True)
class Status:
    """State of the latest comparison.

    Attributes:
        state: "idle" before the first one.
        name: folder of its results.
        done, total: questions answered, and all of them, over all rows.
        label: current row.
        line: the reason why it failed, or a remark about what is kept.
    """

    state: Literal["idle", "running", "done", "cancelled", "failed"] = "idle"
    name: str = ""
    done: int = 0
    total: int = 0
    label: str = ""
    line: str = ""


class Jobs:
    """One comparison at a time, in a thread, on the model that the page answers with.

    Args:
        bench: the model; its lock is given up between batches, so that questions are answered meanwhile.
        folder: folder of all results; each comparison has a folder in it.
        data: as for :func:`~tokensieve.evaluate.load_data`.
        loading: the options that the model was loaded with, for the record.
    """

    def __init__(
        self, bench: Workbench, folder: Path, data: str = "reference", loading: LoadOptions = DEFAULTS
    ) -> None:
        self._bench, self._folder, self._data, self._loading = bench, folder, data, loading
        self._status, self._starting = Status(), threading.Lock()
        self._cancel, self._thread = threading.Event(), threading.Thread()

    @property
    def status(self) -> Status:
        return self._status

    def start(self, name: str, methods: Sequence[str], keeps: Sequence[Budget], questions: int) -> None:
        """Start a comparison, or continue the one whose folder has this name.

        Raises:
            Refusal: a bad name, method, budget or number, or a comparison that runs already.
        """
        folder = self.folder_of(name)
        check_number("questions", questions, 1, MOST_QUESTIONS)
        settings = Settings(batch_size=8)
        self._bench.plan(methods, keeps)  # a bad spec is refused before the data are read
        check_report_extra()
        with self._starting:
            if self._status.state == "running":
                raise Refusal(f"the comparison {self._status.name} is running; wait for it, or cancel it")
            self._cancel.clear()
            self._status = Status("running", name, label="reading the data")
        run = partial(self._run, folder, list(methods), list(keeps), questions, settings)
        self._thread = threading.Thread(target=run, name=f"compare {name}", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """End the comparison after its current batch. Its answers are kept."""
        self._cancel.set()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the comparison; return whether it has ended."""
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def reports(self) -> list[str]:
        """Return the names of the folders with a report, the newest first."""
        paths = self._folder.glob(f"*/{REPORT}")
        return [path.parent.name for path in sorted(paths, key=lambda path: -path.stat().st_mtime)]

    def report(self, name: str) -> str:
        """Return the page of a comparison.

        Raises:
            Refusal: there is none.
        """
        path = self.folder_of(name) / REPORT
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            raise Refusal(f"there is no {REPORT} in {name}; `tokensieve compare --output` writes one") from None

    def folder_of(self, name: str) -> Path:
        """Return the folder of a comparison; refuse a name that could lead out of the folder of results."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise Refusal(f"a name consists of letters, digits, dots, dashes and underscores; got {name!r:.80}")
        return self._folder / name

    def _run(self, folder: Path, methods: list[str], keeps: list[Budget], questions: int, settings: Settings) -> None:
        try:
            model, processor = self._bench.model, self._bench.processor
            samples = load_data(self._data, types=types_known_to(model, self._data), limit=questions)
            with self._bench.lock:
                comparison = Comparison(model, processor, samples, settings, loading=self._loading)
                results = comparison.run(methods, keeps, folder, self._progress)
            write_report(results, folder, crop=partial(as_seen, processor=processor))
            self._status = replace(self._status, state="done")
        except Cancelled:
            kept = "its answers are kept; start it again to continue"
            self._status = replace(self._status, state="cancelled", line=kept)
        except (Refusal, DataError, OSError) as error:
            self._status = replace(self._status, state="failed", line=" ".join(str(error).split()))
        except BaseException:
            self._status = replace(self._status, state="failed", line="an error in Tokensieve: see the terminal")
            raise

    def _progress(self, done: int, total: int, label: str) -> None:
        """Record the progress, let waiting questions have the model, and end the comparison if it is cancelled."""
        self._status = replace(self._status, done=done, total=total, label=label)
        self._bench.lock.release()
        try:
            time.sleep(PAUSE)
        finally:
            self._bench.lock.acquire()
        if self._cancel.is_set():
            raise Cancelled
