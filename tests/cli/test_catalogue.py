"""The lists of methods and models, as text and as JSON; and help that does not import torch."""

import json
import os
import re
from importlib.metadata import version
from pathlib import Path

import tokensieve
from tests.cli.calling import run, run_many
from tokensieve.version import TESTED


def test_help_is_quick_and_lists_the_commands() -> None:
    times = []
    for _ in range(3):
        before = os.times()
        helped = run("--help")
        after = os.times()  # processor time: other processes do not count
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert helped.code == 0
    for name in ("methods", "models", "ask", "compare", "bench", "check", "train"):
        assert name in helped.out
    assert min(times) < 0.3


def test_the_command_line_does_not_import_torch() -> None:
    loaded = "import sys, tokensieve.cli; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
    assert run_many({"help": ["compare", "--help"]}, before=loaded)["help"].code == 0


def test_the_versions_are_printed_without_torch() -> None:
    blocked = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
    outcome = run_many({"version": ["--version"]}, before=blocked)["version"]
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == f"tokensieve {tokensieve.__version__}"
    for library, line in zip(("torch", "transformers"), lines[2:], strict=True):
        lowest, highest = TESTED[library]
        tested = lowest if lowest == highest else f"{lowest} to {highest}"
        assert line == f"{library} {version(library)} (tested: {tested})"


def test_one_method_has_a_page() -> None:
    own = Path(tokensieve.__file__).parent / "commands" / "templates" / "connector.py"
    outcomes = run_many({
        "page": ["methods", "hired"],
        "json": ["methods", "hired", "--json"],
        "stage": ["methods", "--stage", "encoder"],
        "list": ["methods"],
        "every page": ["methods", "pumer"],
        "file": ["methods", f"{own}:MyMethod"],
        "unknown": ["methods", "vtccls"],
        "both": ["methods", "hired", "--stage", "connector"],
    })  # fmt: skip
    page = outcomes["page"].out
    info = {info.name: info for info in tokensieve.list_methods()}["hired"]
    assert "stage: connector" in page
    assert f"https://arxiv.org/abs/{info.paper.removeprefix('arXiv:')}" in page
    assert "cost: " in page
    assert "not stated" not in page
    for name, default in info.parameters.items():
        assert re.search(rf"^ {name} .*{re.escape(repr(default))}", page, re.M), name
    assert json.loads(outcomes["json"].out)["name"] == "hired"
    assert outcomes["file"].out.startswith("my-method\n")
    in_encoder = {info.name for info in tokensieve.list_methods() if info.stage == "encoder"}
    assert set(re.findall(r"^ ([a-z][\w+-]*) ", outcomes["stage"].out, re.M)) == {"method", *in_encoder}
    for name in ("page", "stage", "list", "every page"):
        assert max(map(len, outcomes[name].out.splitlines())) <= 100, name
    assert "did you mean vtc-cls?" in outcomes["unknown"].refused()
    assert "--stage filters the list" in outcomes["both"].refused()


def test_methods_and_models() -> None:
    outcomes = run_many({
        "methods": ["methods"],
        "methods json": ["methods", "--json"],
        "models": ["models"],
        "models json": ["models", "--json"],
    })  # fmt: skip
    assert all(outcome.code == 0 and outcome.err == "" for outcome in outcomes.values())
    methods = json.loads(outcomes["methods json"].out)
    assert [method["name"] for method in methods] == [info.name for info in tokensieve.list_methods()]
    assert set(methods[0]) == {"name", "title", "paper", "stage", "needs", "trained", "parameters"}
    assert all(method["name"] in outcomes["methods"].out for method in methods)
    (llava,) = (family for family in json.loads(outcomes["models json"].out) if family["name"] == "llava")
    assert "llava" in llava["model_types"]
    assert "connector" in llava["stages"]
    assert llava["title"] in outcomes["models"].out
