"""The README says what is true: its catalogue, its commands, its code."""

import re
from pathlib import Path

import pytest

import tokensieve
from tests.cli.calling import run_many
from tokensieve import reference

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_catalogue_is_the_registry() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|.*\| (\w+) \| (?:\[([\d.v]+)\]\(\S+\)|baseline) \|$", README, re.M)
    listed = {name: (stage, f"arXiv:{paper}" if paper else "baseline") for name, stage, paper in rows}
    assert listed == {info.name: (info.stage, info.paper) for info in tokensieve.list_methods()}


def test_commands_exist_with_their_options() -> None:
    pages = README + (ROOT / "docs" / "models.md").read_text("utf-8")
    lines = re.findall(r"^(?:\.venv/bin/)?tokensieve (.+?)(?: +#.*)?$", pages, re.M)
    commands = {line.split()[0] for line in lines}
    helped = run_many({name: [name, "--help"] for name in commands})
    for line in lines:
        outcome = helped[line.split()[0]]
        assert outcome.code == 0
        assert all(option in outcome.out for option in re.findall(r"--[\w-]+", line))
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.M)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text("utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.skipif(not (reference.path() / "model.safetensors").is_file(), reason="no trained weights yet")
def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {})
    assert "?" in capsys.readouterr().out
