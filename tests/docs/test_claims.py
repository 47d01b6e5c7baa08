"""Each claim of docs/claims.md has a command, and the command has something to run."""

import re
import shlex
from pathlib import Path

import pytest

from tokensieve.cli import app

ROOT = Path(__file__).parents[2]
SECTION = re.search(r"^## What is claimed.*?(?=^## )", (ROOT / "docs" / "claims.md").read_text("utf-8"), re.M | re.S)
ROWS = re.findall(r"^\| (\*\*.+?) \| (`.+?) \|$", SECTION[0] if SECTION else "", re.M)
COMMANDS = [(claim, command) for claim, cell in ROWS for command in re.findall(r"`([^`]+)`", cell)]


def test_the_table_is_read_whole() -> None:
    assert SECTION is not None
    lines = [line for line in SECTION[0].splitlines() if line.startswith("| ")]
    assert len(ROWS) == len(lines) - 1 >= 14, "a row for each claim, below the header"


@pytest.mark.parametrize("command", [command for _, command in COMMANDS if "pytest" in command])
def test_tests_of_a_claim_exist(command: str) -> None:
    program, module, name, path, *selection = shlex.split(command)
    assert (program, module, name) == ("python", "-m", "pytest")
    files = [ROOT / path] if path.endswith(".py") else sorted((ROOT / path).rglob("test_*.py"))
    tests = [
        f"{file.name}::{test}" for file in files for test in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    ]
    assert tests
    if selection:
        option, words = selection
        assert option == "-k"
        assert all(any(word in test for test in tests) for word in words.split(" or "))


@pytest.mark.parametrize("command", [command for _, command in COMMANDS if "pytest" not in command])
def test_programs_of_a_claim_exist(command: str) -> None:
    words = shlex.split(command)
    if "tokensieve" in words:
        names = {entry.name for entry in app.registered_commands}
        assert words[words.index("tokensieve") + 1] in names
    elif words[0].startswith("--"):
        assert f'"{words[0]}"' in (ROOT / "benchmarks" / "gpu.py").read_text("utf-8")
    else:
        script = ROOT / words[0]
        assert script.stat().st_mode & 0o111, "the script can be run"
