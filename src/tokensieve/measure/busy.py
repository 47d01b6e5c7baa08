"""Detect a busy machine, which makes times meaningless, and describe it in one line."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from tokensieve.measure.latency import Spread
from tokensieve.measure.paired import FEW_ROUNDS

NOTICEABLE = 0.2  # cores that other processes use; the timers of an idle system stay far below
SHARE = 0.03  # the same as a share of all cores: the accounting of many cores is not exact
STARVED = 0.8  # share of the wall time in which a process that always has work should get at least one core
OBSERVED = 0.25  # seconds of a look at the system; its timers advance by a hundredth
WIDE = 0.2  # quartile range of the unhooked model's times, relative to their median


@dataclass(frozen=True)
class CpuReading:
    """Seconds at one moment, counted from an arbitrary start.

    Attributes:
        wall: of the clock on the wall.
        process: CPU time of this process, over all threads.
        system: CPU time of all processes on the cores that this process may use; ``None`` where the system does not
            report it (only Linux does).
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


def cpu_quota() -> float | None:
    """Return the number of cores that a container may use on average, ``None`` without a limit or off Linux."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def timing_note(
    start: CpuReading,
    end: CpuReading,
    full: Spread,
    *,
    rounds: int,
    threads: int,
    cores: int,
    quota: float | None = None,
    on_cpu: bool = True,
) -> str | None:
    """Return the reason why the times of a session are uncertain, one sentence; ``None`` if nothing is suspicious.

    Args:
        start, end: readings before and after the timed rounds.
        full: prefill times of the unhooked model over the rounds.
        rounds: number of timed rounds.
        threads: threads that work on the CPU: torch's, or 1 where a GPU computes.
        cores: cores that this process may run on.
        quota: cores that it may use on average, if its container has a limit.
        on_cpu: whether the CPU computes. Where a GPU does, the process may sleep and be well.
    """
    crowd = _crowd(start, end, threads, cores, quota)
    reasons = list(crowd)
    process = (end.process - start.process) / max(end.wall - start.wall, 1e-9)
    if on_cpu and process < STARVED:
        reasons.append(f"this process got only {process:.0%} of a core")
    if full.high - full.low > WIDE * full.median:
        share = (full.high - full.low) / full.median
        reasons.append(f"the full model's prefill time varied by {share:.0%} between rounds (quartiles)")
    remedies = ["with OMP_NUM_THREADS=1"] if crowd and threads > 1 else []
    if reasons:
        remedies.append("on a free machine")
    if rounds < FEW_ROUNDS:
        reasons.append(f"{_count(rounds, 'round')} cannot show a spread, {FEW_ROUNDS} or more can")
    if not reasons:
        return None
    remedy = f"; measure again {' or '.join(remedies)}" if remedies else ""
    return f"the times are uncertain: {'; '.join(reasons)}{remedy}"


def crowd_note(
    threads: int,
    cores: int,
    quota: float | None = None,
    *,
    read: Callable[[], CpuReading] = read_cpu,
    sleep: Callable[[float], None] = time.sleep,
) -> str | None:
    """Return one sentence if the threads of torch would share cores with other processes, ``None`` otherwise.

    Threads of one forward wait for each other: where one of them has no core, all spin, and a run can take many times
    longer. The system is observed for a quarter of a second, unless there is one thread only, which waits for nothing.
    """
    if threads < 2:
        return None
    start = read()
    sleep(OBSERVED)
    reasons = _crowd(start, read(), threads, cores, quota)
    if not reasons:
        return None
    return f"{'; '.join(reasons)}: all work may take many times longer than with OMP_NUM_THREADS=1 in the environment"


def _crowd(start: CpuReading, end: CpuReading, threads: int, cores: int, quota: float | None) -> list[str]:
    """Return the reasons why the threads of torch lack cores."""
    reasons = []
    if threads > cores:
        reasons.append(f"torch uses {threads} threads on {_count(cores, 'core')}")
    elif quota is not None and threads > max(1.0, quota):
        reasons.append(f"torch uses {threads} threads in a container limited to {quota:.3g} of {_count(cores, 'core')}")
    if start.system is not None and end.system is not None:
        others = (end.system - start.system - end.process + start.process) / max(end.wall - start.wall, 1e-9)
        # other processes that fit beside the threads take nothing away
        if others > max(NOTICEABLE, SHARE * cores) and others + min(threads, cores) > cores:
            beside = f"beside {_count(threads, 'thread')} of torch"
            reasons.append(f"other processes used {others:.1f} of {_count(cores, 'core')} {beside}")
    return reasons


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
