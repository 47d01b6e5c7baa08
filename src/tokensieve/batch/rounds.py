"""The run of a batch: Ray Data hands parts to workers, and this process writes their answers.

One process writes, so that the output needs no shared disk, and a part's file is put there by a rename. Ray may run a
part again; it can then only replace the same file. Parts that are lost with a worker or a node are given out again in
the next round, until all files are there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from tokensieve.batch.job import Job
from tokensieve.batch.parts import AnswerRow, Format, Output, Totals, check_rows
from tokensieve.batch.source import Part
from tokensieve.batch.worker import Worker
from tokensieve.errors import MissingExtra, Refusal, first_line
from tokensieve.evaluate.lock import locked

Progress: TypeAlias = Callable[[int, int, str], None]
CORES = 4  # CPU cores of a worker without a GPU
ROUNDS = 3  # rounds in a row that answer no part, after which a part is held to end its worker
IN_FLIGHT = 2  # parts that wait at a worker: the next one is there when one ends, and few are lost with it
CHECK_SECONDS = 5  # how often a worker asks whether its round goes on


@dataclass(frozen=True)
class Place:
    """The machines of a run.

    Attributes:
        address: of a Ray cluster; ``None``: this machine alone.
        workers: number of workers; ``None``: one per GPU, else one per few cores.
        gpus_per_worker: GPUs of each; ``None``: one where there are any.
    """

    address: str | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None


@dataclass(frozen=True)
class Share:
    """Resources of each worker. ``cpus`` is what Ray counts, ``threads`` what torch uses."""

    workers: int
    cpus: float
    threads: int
    gpus: float


def run(
    job: Job, output: Path, file_format: Format = "jsonl", place: Place | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Answer each row of the data once by each method, and return the summary, also written to ``summary.json``.

    The same call again continues where an interrupted one stopped.

    Raises:
        Refusal: the data, the model or a method cannot be used; or a part ended its worker again and again.
        ResumeError: the folder holds the answers of another call.
        OutputError: another process writes to the folder, or the disk is full. All parts written before are whole.
    """
    parts = job.parts()
    setup = job.setup(file_format)
    with locked(output, "batch"):
        folder = Output(output, file_format, setup)
        finished = folder.finished(parts)
        totals = Totals()
        for part in parts:
            if part.number in finished:
                totals.add(folder.read(part))
        remaining = {part.number: part for part in parts if part.number not in finished}
        report = _Report(progress, sum(part.rows for part in parts), totals)
        rounds = 0
        if remaining:
            job.check(parts)
            with _cluster(place or Place()) as share:
                rounds = _answer(job, folder, remaining, share, report)
        summary = {
            **asdict(totals),
            "tokens_saved": totals.saved,
            "parts": len(parts),
            "rows_of_this_call": totals.rows - report.start,
            "seconds": report.seconds,
            "rows_per_second": report.rate,
            "rounds": rounds,
        }
        folder.write_json("summary.json", summary)
        return summary


def _answer(job: Job, folder: Output, remaining: dict[int, Part], share: Share, report: _Report) -> int:
    """Answer the remaining parts in rounds; return the number of rounds."""
    runs, rounds, fruitless = len(job.runs()), 0, 0
    environment_written = (folder.folder / "environment.json").exists()
    while remaining:
        rounds, before, reason = rounds + 1, len(remaining), "too little memory?"
        # a generator that is closed stops the round's workers, also if the disk is full
        with closing(_outcomes(job, list(remaining.values()), share)) as outcomes:
            for outcome in outcomes:
                if isinstance(outcome, str):
                    reason = outcome
                    continue
                part = remaining.get(outcome["number"])
                if "refusal" in outcome:
                    raise Refusal(outcome["refusal"])
                if "bug" in outcome:
                    raise RuntimeError(f"in a worker:\n{outcome['bug']}")
                if part is None:
                    continue
                rows = [AnswerRow(**row) for row in outcome["rows"]]
                check_rows(part, rows, runs)
                folder.write(part, rows)
                if not environment_written:
                    folder.write_json("environment.json", outcome["environment"])
                    environment_written = True
                del remaining[part.number]
                report.add(rows)
        fruitless = 0 if len(remaining) < before else fruitless + 1
        if fruitless == ROUNDS:
            first = next(iter(remaining.values()))
            rows_lost = sum(part.rows for part in remaining.values())
            raise Refusal(
                f"{rows_lost:,} rows have no answer: their workers ended without an error {ROUNDS} times in a row "
                f"({reason}), first at {first.name}:{first.first}; all other answers are kept, and the same "
                "command tries these again"
            )
    return rounds


def _outcomes(job: Job, parts: Sequence[Part], share: Share) -> Generator[dict[str, Any] | str, None, None]:
    """Yield the outcomes of the parts as they end, in any order; without those that are lost with a worker or node.

    The last one is Ray's error, if the round ended with one: no worker could start, or answers were lost with a node on
    their way to this process.
    """
    import ray
    from ray.data import ActorPoolStrategy

    in_round = _start_round()
    # one part in a block: a block's answers are handed on when all of it is done
    items = [{"part": json.dumps(asdict(part))} for part in parts]
    # at least one worker starts the round; a lost node does not end it
    pool = ActorPoolStrategy(
        min_size=1,
        max_size=share.workers,
        initial_size=share.workers,
        max_tasks_in_flight_per_actor=IN_FLIGHT,
    )
    # a killed worker starts again where there is room for it. Its parts do not wait for that, which may be never after
    # a lost node: they fail, and the next round answers them
    restarts = {"max_restarts": -1, "max_task_retries": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.60 has no other place for these two, and announces one
        outcomes = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _WorkerInRound,
            fn_constructor_args=(in_round, Worker, job, share.threads),
            batch_size=1,
            compute=pool,
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            **restarts,
        )
    try:
        for row in outcomes.iter_rows():
            yield json.loads(row["outcome"])
    except ray.exceptions.RayError as error:
        yield str(error).strip().splitlines()[-1]  # after Ray's own lines and the traceback in the worker
    finally:
        ray.kill(in_round)


class _Round:
    """An actor that lives as long as its round."""

    def check(self) -> None:
        """Do nothing. The call raises once the round has ended."""


def _start_round() -> Any:
    """Return the handle of a round on this process's node: the loss of another node does not end it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=on_this_node)(_Round).remote()


class _WorkerInRound:
    """A worker that ends with its round.

    Ray Data stops its workers, but one that Ray is just starting again outlives its pool (Ray 2.60) and keeps its cores
    as long as the driver runs: the next round would wait for them.

    Args:
        in_round: handle of the :class:`_Round`.
        kind: class of the worker.
        arguments: of the class.
    """

    def __init__(self, in_round: Any, kind: Callable[..., Worker], *arguments: Any) -> None:
        import ray

        ray.get(in_round.check.remote())  # an error while it starts ends an actor for good
        self.worker = kind(*arguments)
        threading.Thread(target=_end_with, args=(in_round,), daemon=True).start()

    def __call__(self, block: Mapping[str, Any]) -> dict[str, list[str]]:
        return self.worker(block)


def _end_with(in_round: Any) -> NoReturn:
    """End this process soon after the round."""
    import ray

    with suppress(ray.exceptions.RayError):
        while True:
            ray.get(in_round.check.remote())
            time.sleep(CHECK_SECONDS)
    os._exit(0)


@contextmanager
def _cluster(place: Place) -> Iterator[Share]:
    """Start Ray on this machine or join a cluster; yield the share of each worker. Ctrl-C and SIGTERM stop it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # workers without a GPU see none
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtra("batch needs Ray Data", "batch") from error
    from tokensieve.measure.busy import usable_cores

    joined = ray.is_initialized()  # by a caller in Python
    if not joined:
        _check_address(place.address)
        local: dict[str, Any] = {"num_cpus": len(usable_cores()), "include_dashboard": False}
        try:
            with _silent_stderr():  # Ray's core prints its log level
                ray.init(
                    address=place.address or "local",
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    **(local if place.address is None else {}),
                )
        except (ConnectionError, ValueError, RuntimeError) as error:
            if place.address is None:
                raise
            raise Refusal(f"no Ray cluster at {place.address}: {first_line(error)}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # a lost part is answered in the next round
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    main = threading.current_thread() is threading.main_thread()  # signals reach no other thread
    previous = signal.signal(signal.SIGTERM, _interrupt) if main else None
    try:
        yield share_of(place, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    finally:
        if main:
            signal.signal(signal.SIGTERM, previous)
        if not joined:
            ray.shutdown()


def _check_address(address: str | None) -> None:
    """Refuse an address that nothing listens at: Ray would try for minutes, then end the process."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address or "")
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise Refusal(f"no Ray cluster at {address}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop all that this process writes on its file of errors, also from libraries in C++. Exceptions pass."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _interrupt(*_: Any) -> None:
    """End like Ctrl-C: workers stop, the lock is freed, and the same command goes on."""
    raise KeyboardInterrupt


def share_of(place: Place, nodes: Sequence[dict[str, float]]) -> Share:
    """Return the number of workers and the resources of each, so that no core is used twice.

    Raises:
        Refusal: the machines do not have them.
    """
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    each = place.gpus_per_worker if place.gpus_per_worker is not None else min(1.0, gpus)
    if each > gpus:
        raise Refusal(f"--gpus-per-worker {each:g} needs more GPUs than there are: {gpus:g}")
    if each:
        most = sum(int(node.get("GPU", 0) / each + 1e-9) for node in nodes)
        if not most:
            raise Refusal(f"--gpus-per-worker {each:g}: no node has so many GPUs")
        workers = place.workers or most
        if workers > most:
            raise Refusal(f"--workers {workers} with {each:g} GPUs each need more than the {gpus:g} that there are")
        threads = max(1, min(CORES, sum(cores) // workers))
        return Share(workers, min(1.0, sum(cores) / workers), threads, each)
    if not cores:
        raise Refusal("no CPU cores are free for workers")
    if place.workers is None:
        threads = min(CORES, *cores) if len(cores) > 1 else min(CORES, cores[0])
        return Share(sum(node // threads for node in cores), threads, threads, 0)
    # so many cores each that every node holds whole workers
    threads = max(1, sum(cores) // place.workers)
    while threads > 1 and sum(node // threads for node in cores) < place.workers:
        threads -= 1
    if place.workers > sum(cores):
        return Share(place.workers, sum(cores) / place.workers, 1, 0)
    return Share(place.workers, threads, threads, 0)


class _Report:
    """Counts the finished rows and reports them to the caller's callback."""

    def __init__(self, callback: Progress | None, total: int, totals: Totals) -> None:
        self.callback, self.total, self.totals = callback, total, totals
        self.start, self.started = totals.rows, time.monotonic()
        self._show()

    @property
    def seconds(self) -> float:
        """Seconds since the start of this call, with the start of the workers."""
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Rows a second in this call."""
        return (self.totals.rows - self.start) / max(self.seconds, 1e-9)

    def add(self, rows: Sequence[AnswerRow]) -> None:
        """Count a part."""
        self.totals.add(rows)
        self._show()

    def _show(self) -> None:
        if self.callback is not None:
            label = f"{self.totals.saved:.0%} of the visual tokens saved"
            self.callback(self.totals.rows, self.total, label)
