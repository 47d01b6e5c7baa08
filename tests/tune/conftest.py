"""The bundled model with its weights, and a search through the real command."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.cli.calling import COMMAND, ENVIRONMENT, Outcome
from tokensieve import reference

LIMIT = 300  # seconds of a command
SEARCH = (
    "tune", "--max-drop", "20%", "--questions", "140", "--methods", "divprune, pool", "--keep", "50%, 11%",
    "--max-new-tokens", "4", "--batch-size", "35",
)  # fmt: skip
needs_weights = pytest.mark.skipif(not (reference.path() / "model.safetensors").is_file(), reason="no trained weights")


def run(*arguments: str | Path, cwd: Path | None = None) -> Outcome:
    """Call the installed command once; a call that hangs fails the test."""
    program = [COMMAND, *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=LIMIT)
    return Outcome(done.returncode, done.stdout, done.stderr)


def killed(arguments: Sequence[str | Path], ready: Callable[[], bool]) -> int:
    """Start a call, and kill it as soon as it is ready; return its exit code."""
    quiet = partial(subprocess.Popen, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    running = quiet([COMMAND, *map(str, arguments)])
    deadline = time.monotonic() + LIMIT
    while running.poll() is None and time.monotonic() < deadline:
        if ready():
            running.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    return running.wait(timeout=LIMIT)


def answers_in(folder: Path) -> list[tuple[str, str, str]]:
    """Return (run, sample, text) of each recorded answer, in order."""
    lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["run"], row["sample"], row["text"]) for row in rows if "text" in row]


@pytest.fixture(scope="session")
def search_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune") / "out"


@pytest.fixture(scope="session")
def resumed(search_folder: Path) -> tuple[list[tuple[str, str, str]], Outcome]:
    """Kill a search on its way, and run the same command to its end; return the answers before, and the outcome."""
    journal = search_folder / "predictions.jsonl"
    arguments = [*SEARCH, "--output", search_folder]
    code = killed(arguments, lambda: journal.exists() and journal.read_bytes().count(b"\n") > 60)
    assert code == -signal.SIGKILL
    return answers_in(search_folder), run(*arguments)


@pytest.fixture(scope="session")
def best(search_folder: Path, resumed: object) -> Path:
    """The spec file that the search wrote."""
    return search_folder / "best.json"
