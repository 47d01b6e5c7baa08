"""A busy machine makes times meaningless: notice it, and say so in one line."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tokensieve.measure.latency import Spread
from tokensieve.measure.paired import FEW_ROUNDS

NOTICEABLE = 0.2  # cores that other processes use; the timers of an idle system stay far below
SHARE = 0.03  # the same as a share of all cores: the accounting of many cores is not exact
STARVED = 0.8  # share of the wall time in which a process that always has work should get at least one core
WIDE = 0.2  # quartile range of the unhooked model's times, relative to their median


@dataclass(frozen=True)
class CpuReading:
    """Seconds at one moment, counted from an arbitrary start.

    Attributes:
        wall: of the clock on the wall.
        process: CPU time of this process, over all threads.
        system: CPU time of all processes on the cores that this process may use; ``None`` where the system does not
            say (only Linux does).
    """

    wall: float
    process: float
    system: float | None


def read_cpu() -> CpuReading:
    """Read the clocks."""
    try:
        system = cpu_seconds(Path("/proc/stat").read_text("utf-8"), usable_cores(), os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError):
        system = None
    return CpuReading(time.perf_counter(), time.process_time(), system)


def cpu_seconds(stat: str, cores: Collection[int], ticks: int) -> float:
    """Return the seconds that some cores were busy, from the text of ``/proc/stat``; ``ticks`` are per second.

    Raises:
        ValueError: another format.
    """
    total = 0
    for line in stat.splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name.removeprefix("cpu")) in cores:
            user, nice, system, _idle, _wait, irq, soft, stolen, *_ = map(int, numbers)
            total += user + nice + system + irq + soft + stolen
    return total / ticks


def usable_cores() -> set[int]:
    """Return the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def timing_note(
    start: CpuReading, end: CpuReading, full: Spread, *, rounds: int, threads: int, cores: int, on_cpu: bool = True
) -> str | None:
    """Return one sentence that says why the times of a session are uncertain, ``None`` if nothing is suspicious.

    Args:
        start, end: readings before and after the timed rounds.
        full: prefill times of the unhooked model over the rounds.
        rounds: number of timed rounds.
        threads: threads that compute on the CPU (torch's; 1 where a GPU computes).
        cores: cores that this process may use.
        on_cpu: whether the CPU computes. Where a GPU does, the process may sleep and be well.
    """
    wall = max(end.wall - start.wall, 1e-9)
    process = (end.process - start.process) / wall
    reasons, crowded = [], threads > cores
    if crowded:
        reasons.append(f"torch uses {threads} threads on {_count(cores, 'core')}")
    if start.system is not None and end.system is not None:
        others = (end.system - start.system) / wall - process
        # a process beside fewer threads than cores takes nothing away
        if others > max(NOTICEABLE, SHARE * cores) and others + min(threads, cores) > cores:
            crowded = True
            beside = f" beside {_count(threads, 'thread')} of torch" if on_cpu else ""
            reasons.append(f"other processes used {others:.1f} of {_count(cores, 'core')}{beside}")
    if on_cpu and process < STARVED:
        reasons.append(f"this process got only {process:.0%} of a core")
    if full.high - full.low > WIDE * full.median:
        share = (full.high - full.low) / full.median
        reasons.append(f"the full model's prefill time varied by {share:.0%} between rounds (quartiles)")
    if not reasons and rounds >= FEW_ROUNDS:
        return None
    if rounds < FEW_ROUNDS:
        reasons.append(f"{_count(rounds, 'round')} cannot show a spread, {FEW_ROUNDS} or more can")
    advice = []
    if crowded and threads > 1:
        advice.append("with OMP_NUM_THREADS=1")
    if len(reasons) > (rounds < FEW_ROUNDS):
        advice.append("on a free machine")
    remedy = f"; measure again {' or '.join(advice)}" if advice else ""
    return f"the times are uncertain: {'; '.join(reasons)}{remedy}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
