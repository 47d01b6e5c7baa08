"""The lists of methods and models, as text and as JSON; and help that does not import torch."""

import json
import os

import tokensieve
from tests.cli.calling import run, run_many


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
