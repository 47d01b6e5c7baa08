"""Progress where stderr is no terminal: few lines, with the rate and the time left."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest

from tests.cli.calling import COMMAND, ENVIRONMENT, run
from tokensieve.commands.console import ProgressLines, print_json, progress


class Clock:
    """A clock that a test sets."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def lines(capsys: pytest.CaptureFixture[str], steps: list[tuple[float, int]], total: int) -> list[str]:
    clock = Clock()
    update = ProgressLines(clock)
    for seconds, done in steps:
        clock.seconds = 1000 + seconds
        update(done, total, "vtc-cls(keep=16)")
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_a_line_names_share_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    # 100 answers are there from an earlier call: they say nothing about the rate
    assert lines(capsys, [(10, 100), (20, 120), (40, 160)], 1000) == [
        "160 of 1,000 questions (16%), 2 a second, 7 min left; vtc-cls(keep=16)"
    ]


def test_a_short_run_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, [(i, i) for i in range(29)], 28) == []


def test_a_long_run_prints_about_one_line_per_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    hour = lines(capsys, [(i, i) for i in range(3600)], 3600)
    assert 9 <= len(hour) <= 11
    assert hour[0].startswith("30 of 3,600 questions (1%), 1 a second, 60 min left")
    # a slow run of three days says every ten minutes that it lives
    days = lines(capsys, [(10 * i, i) for i in range(3 * 8640)], 3 * 8640)
    gaps = 3 * 24 * 6
    assert gaps - 2 <= len(days) <= gaps + 1
    assert days[0].endswith("72 h left; vtc-cls(keep=16)")


def test_a_resumed_and_finished_run_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, [(60, 500), (120, 1000)], 1000) == ["500 of 1,000 questions (50%); vtc-cls(keep=16)"]
    assert lines(capsys, [(0, 500), (0.1, 1000)], 1000) == []


def test_without_a_terminal_lines_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as update:
        assert isinstance(update, ProgressLines)


COMPARE = ("compare", "--limit", "2", "--methods", "uniform", "--keep", "25%, 11%", "--no-measure", "--no-report")


def test_output_to_a_terminal_without_unicode(tmp_path: Path) -> None:
    """The table has dashes and quotation marks that ASCII lacks."""
    printed = run(*COMPARE, "--output", tmp_path / "é", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (printed.code, printed.err.count("Traceback")) == (0, 0), printed.err
    assert "uniform" in printed.out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_loses_nothing(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    written, data = io.BytesIO(), {"answer": "a café, 猫"}
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, errors="replace"))
    print_json(data)
    text = written.getvalue().decode(encoding)
    assert json.loads(text) == data
    assert ("猫" in text) == (encoding == "utf-8")


@pytest.mark.parametrize("stream", [1, 2])
def test_a_closed_stream_takes_nothing(stream: int) -> None:
    call = f'exec "$0" methods --stage fusion {stream}>&-'
    done = subprocess.run(["sh", "-c", call, COMMAND], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("pumer" in done.stdout) == (stream == 2)
