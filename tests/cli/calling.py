"""The installed command in a process of its own, or many calls in one process to save the starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# tests run in parallel: threads that wait for each other would make a tiny model slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = str(Path(sys.executable).with_name("tokensieve"))

MANY = """
import contextlib, io, json, sys, traceback
from tokensieve.cli import main
outcomes = {}
for name, arguments in json.load(sys.stdin).items():
    sys.argv, code = ["tokensieve", *arguments], 0
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as leave:
            code = leave.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    outcomes[name] = [code, out.getvalue(), err.getvalue()]
json.dump(outcomes, sys.stdout)
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def refused(self) -> str:
        """Return the one line on stderr of a user's error, apart from notes."""
        assert self.code == 2, self.err
        assert self.out == ""
        (line,) = [line for line in self.err.splitlines() if not line.startswith("note: ")]
        assert "Traceback" not in line
        return line


def run(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> Outcome:
    """Call the installed command once."""
    program = [COMMAND, *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True, env=ENVIRONMENT | environment, cwd=cwd)
    return Outcome(done.returncode, done.stdout, done.stderr)


def run_many(calls: Mapping[str, Sequence[str | Path]], *, before: str = "") -> dict[str, Outcome]:
    """Make several calls, one after the other, in one process, after the Python code ``before``."""
    request = json.dumps({name: [str(argument) for argument in arguments] for name, arguments in calls.items()})
    program = [sys.executable, "-c", before + MANY]
    done = subprocess.run(program, input=request, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return {name: Outcome(*outcome) for name, outcome in json.loads(done.stdout).items()}
