"""A busy machine is noticed from readings; a quiet one passes in silence."""

from pathlib import Path

import pytest

from tokensieve.measure import CpuReading, Spread, cpu_quota, crowd_note, read_cpu, timing_note
from tokensieve.measure.busy import cpu_seconds

START = CpuReading(wall=100.0, process=20.0, system=5000.0)
STEADY = Spread(26.0, 25.5, 26.8)
STAT = """cpu  1000 200 300 9000 50 10 20 30 400 0
cpu0 600 100 200 4000 25 5 10 15 300 0
cpu1 400 100 100 5000 25 5 10 15 100 0
intr 6296003 0 0
"""


def after(seconds=10.0, process=1.0, others=0.0):
    """Return a reading after so many seconds: cores that this process and the others used on average."""
    return CpuReading(
        START.wall + seconds, START.process + process * seconds, START.system + (process + others) * seconds
    )


def note(end, full=STEADY, **options):
    return timing_note(START, end, full, **{"rounds": 10, "threads": 1, "cores": 2} | options)


@pytest.mark.parametrize(
    ("end", "options"),
    [
        (after(), {}),
        (after(process=1.9), {"threads": 2}),
        (after(process=1.9, others=0.1), {"threads": 2}),  # an idle desktop
        (after(others=1.0), {}),  # a neighbour on the other core
        (after(others=30.0), {"cores": 64}),
        (after(process=60, others=1.0), {"threads": 64, "cores": 64}),  # the kernel's accounting is not exact
        (after(process=0.3), {"on_cpu": False}),  # waits for a GPU
        (CpuReading(110.0, 29.9, None), {}),  # no /proc/stat
    ],
)
def test_a_quiet_machine_is_not_mentioned(end, options):
    assert note(end, **options) is None


def test_other_processes_on_the_same_cores_are_named():
    text = note(after(process=1.8, others=0.9), threads=2)
    assert text == (
        "the times are uncertain: other processes used 0.9 of 2 cores beside 2 threads of torch; "
        "measure again with OMP_NUM_THREADS=1 or on a free machine"
    )
    assert "\n" not in text
    assert "other processes used 1.7 of 2 cores beside 1 thread" in note(after(others=1.7))
    assert "OMP_NUM_THREADS" not in note(after(others=1.7))


def test_more_threads_than_cores_are_named():
    assert "torch uses 8 threads on 2 cores; measure again with OMP_NUM_THREADS=1" in note(after(), threads=8)
    assert "torch uses 2 threads on 1 core;" in note(after(), threads=2, cores=1)


def test_a_container_with_fewer_cores_than_threads_is_named():
    assert note(after(process=2.0), threads=8, cores=64, quota=2.0) == (
        "the times are uncertain: torch uses 8 threads in a container limited to 2 of 64 cores; "
        "measure again with OMP_NUM_THREADS=1 or on a free machine"
    )
    assert note(after(), threads=1, cores=64, quota=0.9) is None
    assert note(after(), threads=2, cores=64, quota=2.0) is None


@pytest.mark.parametrize(
    ("text", "quota"), [("200000 100000\n", 2.0), ("50000 100000\n", 0.5), ("max 100000\n", None), ("?\n", None)]
)
def test_the_limit_of_a_container_is_read(monkeypatch, text, quota):
    monkeypatch.setattr(Path, "read_text", lambda *args: text)
    assert cpu_quota() == quota


def test_a_process_that_gets_no_core_is_named():
    assert "this process got only 40% of a core" in note(after(process=0.4))
    assert "this process got only 40% of a core" in note(CpuReading(110.0, 24.0, None))


def test_times_that_vary_are_named():
    assert "varied by 31% between rounds" in note(after(), Spread(26.0, 24.0, 32.0))


def test_few_rounds_are_named():
    assert note(after(), rounds=1) == "the times are uncertain: 1 round cannot show a spread, 5 or more can"
    assert note(after(), rounds=4).startswith("the times are uncertain: 4 rounds cannot")


def test_threads_that_share_cores_are_named_before_the_work():
    """Two threads of torch beside a busy process once made a run 80 times slower, without a word."""

    def look(threads, cores, others):
        readings = iter([START, after(0.25, process=0.1, others=others)])
        return crowd_note(threads, cores, read=lambda: next(readings), sleep=slept.append)

    slept = []
    text = look(2, 2, others=1.0)
    assert text == (
        "other processes used 1.0 of 2 cores beside 2 threads of torch: "
        "all work may take many times longer than with OMP_NUM_THREADS=1 in the environment"
    )
    assert look(8, 2, others=0.0).startswith("torch uses 8 threads on 2 cores: all work")
    assert look(2, 2, others=0.1) is None
    assert look(2, 4, others=1.5) is None, "there is a core for each"
    assert slept == [0.25] * 4
    assert look(1, 2, others=2.0) is None
    assert len(slept) == 4, "one thread waits for nothing: there is nothing to look for"


def test_only_the_cores_of_this_process_count():
    assert cpu_seconds(STAT, {0, 1}, ticks=100) == pytest.approx(15.6)
    assert cpu_seconds(STAT, {1}, ticks=100) == pytest.approx(6.3)
    assert cpu_seconds(STAT, {1}, ticks=50) == pytest.approx(12.6)


def test_a_system_without_the_file_is_read_as_unknown(monkeypatch):
    def missing(*args):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert read_cpu().system is None


@pytest.mark.parametrize("text", ["cpu0 many\n", "cpu0 1 2\n"])
def test_an_unknown_format_is_read_as_unknown(monkeypatch, text):
    monkeypatch.setattr(Path, "read_text", lambda *args: text)
    assert read_cpu().system is None


def test_a_reading_advances():
    first, second = read_cpu(), read_cpu()
    assert first.wall <= second.wall
    assert first.process <= second.process
