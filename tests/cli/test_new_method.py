"""``new-method``: the written method works wherever a name does, and its test fails for a wrong method."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.calling import ENVIRONMENT, Outcome, run_many

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def outcomes(folder: Path, model: str, photo: Path) -> dict[str, Outcome]:
    new = ["new-method", "--output", folder / "new"]
    own = f"{folder}/new/loudest.py:Loudest"
    compare = ["compare", "--model", model, "--methods", f"{own}, random", "--keep", "25%", "--limit", "8", "--json"]
    ask = ["ask", photo, "what colour is the cup?", "--model", model, "--max-new-tokens", "2", "--json"]
    return run_many({
        "connector": [*new, "loudest"],
        "decoder": [*new, "most-watched", "--stage", "decoder"],
        "trained": [*new, "small-net", "--trained"],
        "train": ["train", f"{folder}/new/small_net.py:SmallNet", "--model", model, "--data", "reference:train[:26]",
                  "--batch-size", "13", "--output", folder / "net"],
        "compare trained": [*compare[:4], f"{folder}/new/small_net.py:SmallNet(weights='{folder}/net')",
                            *compare[5:], "--no-measure", "--no-report", "--output", folder / "runs2"],
        "trained inside": [*new, "other", "--trained", "--stage", "decoder"],
        "again": [*new, "loudest"],
        "taken": [*new, "vtc-cls"],
        "module": [*new, "json"],
        "bad name": [*new, "../Loudest"],
        "hides": [*new, "connector-tokens"],
        "stage": [*new, "other", "--stage", "fusion"],
        "folder": ["new-method", "other", "--output", folder / "a b"],
        "no folder": ["new-method", "other", "--output", folder / "new" / "loudest.py"],
        "ask": [*ask, "--method", f"{folder}/new/most_watched.py:MostWatched", "--keep", "16"],
        "compare": [*compare, "--no-measure", "--no-report", "--seeds", "1", "--output", folder / "runs"],
    })  # fmt: skip


def test_it_prints_the_next_commands(outcomes: dict[str, Outcome], folder: Path) -> None:
    assert {path.name for path in (folder / "new").glob("*.py")} == {
        "loudest.py", "test_loudest.py", "most_watched.py", "test_most_watched.py", "small_net.py", "test_small_net.py"
    }  # fmt: skip
    outcome = outcomes["connector"]
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[2:] == [
        f"  tokensieve check reference --method {folder}/new/loudest.py:Loudest",
        f'  tokensieve compare --methods "{folder}/new/loudest.py:Loudest, random" --keep 25% --limit 200',
        f"  python -m pip install pytest && python -m pytest {folder}/new/test_loudest.py",
    ]
    assert "Nothing has run yet" in outcome.out.splitlines()[0]


def pytest_of(folder: Path) -> str:
    """Return the output of pytest on a folder, called from another one."""
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder.parent)
    return done.stdout + done.stderr


def test_its_tests_pass_as_written_and_fail_when_the_method_is_wrong(
    outcomes: dict[str, Outcome], folder: Path
) -> None:
    assert re.search(r"^12 passed in", pytest_of(folder / "new"), re.M)
    broken = folder / "broken"
    broken.mkdir()
    (broken / "test_loudest.py").write_text((folder / "new" / "test_loudest.py").read_text("utf-8"))
    code = (folder / "new" / "loudest.py").read_text("utf-8")
    across_the_batch = ".sum(-1).mean(0, keepdim=True).expand(len(image.features), -1)"
    one_short = """
    def reduce(self, image):
        return super().reduce(replace(image, budget=image.budget - 1))
"""
    code = code.replace(".sum(-1)", across_the_batch).replace("import dataclass", "import dataclass, replace")
    code += one_short
    (broken / "loudest.py").write_text(code)
    output = pytest_of(broken)
    assert re.search(r"^3 failed, 1 passed in", output, re.M), output


def test_the_file_stands_wherever_a_name_does(outcomes: dict[str, Outcome]) -> None:
    asked = json.loads(outcomes["ask"].out)
    assert asked["method"] == "most-watched(keep=16)"
    assert asked["tokens_after"] == 16
    full, own, random, *_ = json.loads(outcomes["compare"].out)
    assert [row["tokens_after"] for row in (full, own, random)] == [144, 36, 36]


def test_the_written_net_is_trained_by_one_command(outcomes: dict[str, Outcome], folder: Path) -> None:
    assert len((folder / "new" / "small_net.py").read_text("utf-8").splitlines()) <= 40
    assert f"  tokensieve train {folder}/new/small_net.py:SmallNet --output runs/small-net" in outcomes["trained"].out
    assert outcomes["train"].code == 0, outcomes["train"].err
    assert json.loads((folder / "net" / "method.json").read_text("utf-8"))["method"] == "small-net"
    full, own, *_ = json.loads(outcomes["compare trained"].out)
    assert [row["tokens_after"] for row in (full, own)] == [144, 36]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trained inside", "the written net decides before the LLM"),
        ("again", "loudest.py exists already; choose another name or folder"),
        ("taken", "the method name 'vtc-cls' is taken"),
        ("module", "a file json.py would hide Python's own module"),
        ("bad name", "small letters, digits and hyphens, as in 'loud-words'; got '../Loudest'"),
        ("hides", "a class ConnectorTokens would hide"),
        ("stage", "'fusion' is not one of 'connector', 'decoder'"),
        ("folder", "a method spec cannot name"),
        ("no folder", "loudest.py"),
    ],
)
def test_mistakes_are_one_line(outcomes: dict[str, Outcome], folder: Path, name: str, words: str) -> None:
    assert words in outcomes[name].refused()
    assert not list(folder.rglob("*other*"))


def test_contributing_shows_the_written_file(outcomes: dict[str, Outcome], folder: Path) -> None:
    shown = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.S)
    assert shown is not None
    assert shown[1] == (folder / "new" / "loudest.py").read_text("utf-8")


def test_a_broken_plugin_is_a_note_and_no_obstacle() -> None:
    plugin = """
from importlib.metadata import EntryPoint
from tokensieve.methods import registry
broken = EntryPoint("mine", "no_such_module:Mine", "tokensieve.methods")
registry.entry_points = lambda group: [broken]
"""
    listed = run_many({"methods": ["methods", "--json"]}, before=plugin)["methods"]
    assert listed.code == 0
    assert "vtc-cls" in [method["name"] for method in json.loads(listed.out)]
    warning = "the method plug-in 'mine' (no_such_module:Mine) is left out: ModuleNotFoundError: No module named"
    (line,) = listed.err.splitlines()
    assert line.startswith(f"note: {warning}")
