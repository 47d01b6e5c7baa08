"""One comparison at a time per folder: between real processes, after a kill, and on disks that fail."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from tokensieve import Refusal
from tokensieve.errors import OutputError
from tokensieve.evaluate import compare
from tokensieve.evaluate.lock import HOLDER, LOCK, locked

HOLD = """
import sys, time
from pathlib import Path
from tokensieve.evaluate.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder ``out``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_with_the_first_ones_number(holder, tmp_path):
    line = (
        rf"another comparison writes to .*out \(process {holder.pid} on .+, started 20.+ UTC\); wait for it, or choose"
    )
    for _ in range(2):  # a refused attempt changes nothing
        with pytest.raises(OutputError, match=line), locked(tmp_path / "out"):
            pytest.fail("two processes hold one folder")
    with locked(tmp_path / "other"):
        pass


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_does_not_block(holder, tmp_path, with_signal):
    holder.send_signal(with_signal)
    holder.wait()
    assert (tmp_path / "out" / LOCK).exists()
    assert (tmp_path / "out" / HOLDER).exists()
    refused = pytest.raises(OutputError, match=rf"\(process {os.getpid()} on")
    with locked(tmp_path / "out"), refused, locked(tmp_path / "out"):
        pytest.fail("held twice")
    assert not (tmp_path / "out" / HOLDER).exists()


def test_a_folder_is_free_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path):
        pass


def test_compare_holds_its_folder(model, processor, samples, tmp_path):
    options = {"output": tmp_path / "out", "measure": False, "max_new_tokens": 1}
    refused = []

    def again(done, total, label):
        before = (tmp_path / "out" / "predictions.jsonl").read_bytes()
        with pytest.raises(Refusal, match="another comparison writes to") as caught:
            compare(model, processor, samples, [], [], **options)
        refused.append(caught.value)
        assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == before

    compare(model, processor, samples, [], [], progress=again, **options)
    assert refused
    compare(model, processor, samples, [], [], **options)  # it is free again


def test_a_full_disk_does_not_name_an_old_process(tmp_path, monkeypatch):
    (tmp_path / HOLDER).write_text('{"process": 1, "host": "old", "started": "2001"}')

    def no_space(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    with locked(tmp_path), pytest.raises(OutputError, match=r"\(its process is not known\)"), locked(tmp_path):
        pytest.fail("held twice")


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), PermissionError(13, "Permission denied")])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with pytest.raises(OutputError, match=rf"cannot use the output folder .*: {error.strerror}"), locked(tmp_path):
        pytest.fail("held")
