"""A bug is never a refusal: a traceback and exit code 1 in ``ask``, ``compare`` and ``bench``, a FAIL in ``check``."""

import json
from pathlib import Path

import pytest

from tests.cli.calling import Outcome, run, run_many
from tokensieve.check import LAWS

METHOD = """
from dataclasses import dataclass

import torch

from tokensieve import Method, Reduction, VisualTokens, register


@register("{name}", paper="none")
@dataclass(frozen=True)
class Buggy(Method):
    keep: int | float = 64

    def reduce(self, image: VisualTokens) -> Reduction:
        {bug}
        return image.keep(torch.arange(self.keep).expand(b, -1))
"""
BUGS = {
    "unpacking": ("b, n = image.features.shape", "ValueError: too many values to unpack (expected 2"),
    "library": ("b = image.features.detach().numpy().reshape(1, 7)", "ValueError: cannot reshape array of size"),
}
COMMANDS = ("ask", "compare", "bench")
BESIDE = {"uniform": "pass", "vtc-cls(first_layer=40)": "refused"}
ENGINE_ERROR = "ValueError: zip() argument 2 is longer than argument 1"
# a strict zip over lists of different lengths, inside a function that every prefill runs
MISMATCH = """
from tokensieve.engine.connector.prefill import Connector
def prefill(self, *args, **kwargs):
    return [pair for pair in zip([1], [1, 2], strict=True)]
Connector.prefill = prefill
"""


def calls(model: str, photo: Path, method: str, output: Path) -> dict[str, list[str | Path]]:
    options = ["--keep", "16", "--model", model]
    quick = ["--limit", "2", "--no-measure", "--no-report", "--output", output]
    return {
        "ask": ["ask", photo, "what is it?", "--method", method, *options],
        "compare": ["compare", "--methods", method, *options, *quick],
        "bench": ["bench", "--methods", method, "--repeats", "1", *options],
        "check": ["check", model, "--method", method],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bugs")
    for name, (bug, _) in BUGS.items():
        (folder / f"{name}.py").write_text(METHOD.format(name=f"buggy-{name}", bug=bug), "utf-8")
    return folder


@pytest.fixture(scope="module")
def in_a_plugin(model: str, photo: Path, folder: Path) -> dict[str, Outcome]:
    return run_many({
        f"{name}: {command}": arguments
        for name in BUGS
        for command, arguments in calls(model, photo, f"{folder}/{name}.py:Buggy", folder / name).items()
    } | {
        f"check beside {name}": ["check", model, "--method", name, "--method", f"{folder}/unpacking.py:Buggy", "--json"]
        for name in BESIDE
    } | {
        "compare without it": ["compare", "--methods", "uniform", "--keep", "16", "--model", model, "--limit", "2",
                               "--no-measure", "--no-report", "--output", folder / "unpacking", "--json"],
    })  # fmt: skip


@pytest.fixture(scope="module")
def in_the_engine(model: str, photo: Path, folder: Path) -> dict[str, Outcome]:
    return run_many(calls(model, photo, "uniform", folder / "engine"), before=MISMATCH)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_a_plugin_is_a_traceback_with_its_line(
    in_a_plugin: dict[str, Outcome], folder: Path, bug: str, command: str
) -> None:
    outcome, (line, message) = in_a_plugin[f"{bug}: {command}"], BUGS[bug]
    number = next(i for i, text in enumerate(METHOD.splitlines(), 1) if "{bug}" in text)
    assert outcome.code == 1
    assert outcome.out == ""
    assert f'File "{folder}/{bug}.py", line {number}, in reduce\n    {line}\n' in outcome.err
    assert outcome.err.splitlines()[-1].startswith(message)


def test_the_installed_command_ends_the_same_way(model: str, photo: Path, folder: Path) -> None:
    outcome = run(*calls(model, photo, f"{folder}/unpacking.py:Buggy", folder / "out")["ask"])
    assert outcome.code == 1
    assert f'File "{folder}/unpacking.py", line' in outcome.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_strict_zip_in_the_engine_is_a_traceback(in_the_engine: dict[str, Outcome], command: str) -> None:
    outcome = in_the_engine[command]
    assert outcome.code == 1
    assert "Traceback (most recent call last):" in outcome.err
    assert "in prefill" in outcome.err
    assert outcome.err.splitlines()[-1] == ENGINE_ERROR


@pytest.mark.parametrize("bug", BUGS)
def test_check_fails_every_law_of_a_buggy_plugin(in_a_plugin: dict[str, Outcome], bug: str) -> None:
    outcome = in_a_plugin[f"{bug}: check"]
    assert outcome.code == 1
    assert outcome.out.count("FAIL") == len(LAWS)
    assert "refused" not in outcome.out
    assert BUGS[bug][1] in outcome.out
    assert outcome.err.splitlines()[-1] == f"{len(LAWS)} laws are broken"


def test_check_fails_every_law_of_a_buggy_engine(in_the_engine: dict[str, Outcome]) -> None:
    outcome = in_the_engine["check"]
    assert outcome.code == 1
    assert outcome.out.count("FAIL") == len(LAWS)
    assert ENGINE_ERROR in outcome.out


@pytest.mark.parametrize(("name", "status"), BESIDE.items())
def test_check_never_exits_0_beside_another_method(in_a_plugin: dict[str, Outcome], name: str, status: str) -> None:
    outcome = in_a_plugin[f"check beside {name}"]
    assert outcome.code == 1
    verdicts = json.loads(outcome.out)["verdicts"]
    assert [verdict["status"] for verdict in verdicts] == [status] * len(LAWS) + ["FAIL"] * len(LAWS)


def recorded_runs(folder: Path) -> list[str]:
    header, *lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    assert "setup" in json.loads(header)
    return [json.loads(line)["run"] for line in lines]


def test_a_bug_keeps_the_answers_before_it(in_a_plugin: dict[str, Outcome], folder: Path) -> None:
    assert in_a_plugin["library: compare"].code == 1
    assert recorded_runs(folder / "library") == ["full"] * 2


def test_a_comparison_resumes_after_a_bug(in_a_plugin: dict[str, Outcome], folder: Path) -> None:
    resumed = in_a_plugin["compare without it"]
    assert resumed.code == 0, resumed.err
    assert [row["method"] for row in json.loads(resumed.out)] == ["full", "uniform", "oracle", "blind"]
    rows = ["full", "uniform(keep=16)", "oracle(keep=16)", "blind"]
    moved = ["uniform(keep=16)"]  # of the one example image
    assert recorded_runs(folder / "unpacking") == [run for run in rows for _ in range(2)] + moved
