"""``check``: the equivalence checks on a model, as a table and as JSON, and the exit code."""

import json
import re

import pytest

from tests.cli.calling import Outcome, run_many
from tokensieve.check import LAWS

FLAKY = '''
from dataclasses import dataclass

import torch

from tokensieve import Method, Needs, Reduction, VisualTokens, register


@register("flaky", paper="none", needs=Needs())
@dataclass(frozen=True)
class Flaky(Method):
    """Keeps other tokens in every call."""

    keep: int | float = 64

    def reduce(self, image: VisualTokens) -> Reduction:
        order = torch.rand(image.features.shape[:2]).argsort(-1)
        return image.keep(order[:, : image.budget])
'''


@pytest.fixture(scope="module")
def outcomes(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("check")
    (folder / "flaky.py").write_text(FLAKY, "utf-8")
    (folder / "empty").mkdir()
    two = ["--method", "divprune(keep=9)", "--method", "fastv"]
    refused = ["--method", "vtc-cls(first_layer=40)"]
    return run_many({
        "defaults": ["check", model],
        "json": ["check", model, *two, "--random", "--keep", "16", "--json"],
        "half": ["check", model, "--dtype", "bfloat16", "--method", "fastervlm", "--json"],
        "flaky": ["check", model, "--method", f"{folder}/flaky.py:Flaky"],
        "refused": ["check", model, *refused, "--method", "uniform"],
        "all refused": ["check", model, *refused],
        "by score": ["check", model, "--method", "trsm", *refused, "--budget-scope", "sample-score", "--json"],
        "no method": ["check", model, "--method", "nonsuch"],
        "no model": ["check", folder / "empty"],
    })  # fmt: skip


def test_every_kind_of_method_passes_on_the_bundled_model(outcomes: dict[str, Outcome]) -> None:
    checked = outcomes["defaults"]
    assert checked.code == 0, checked.err + checked.out
    rows = [line for line in checked.out.splitlines() if "(keep=0.25" in line]
    assert [row.split("(")[0].strip() for row in rows] == ["fastervlm", "divprune", "trsm", "visionzip", "fastv"]
    for row in rows:
        assert row.count("pass") == len(LAWS)
        assert "pass 0.0e+00" in row, "identity is exact"
    assert re.search(r"llava, float32\. Numbers: .* rounding alone makes \d\.\de-0\d", checked.out)


def test_json_holds_every_number(outcomes: dict[str, Outcome]) -> None:
    checked = outcomes["json"]
    assert checked.code == 0, checked.err
    report = json.loads(checked.out)
    assert (report["model_type"], report["dtype"], report["random_weights"]) == ("llava", "float32", True)
    assert 0 < report["noise_floor"] < report["allowed"] < 1e-3
    found = report["verdicts"]
    assert [v["method"] for v in found] == ["divprune(keep=9)"] * len(LAWS) + ["fastv(keep=16)"] * len(LAWS)
    assert [v["law"] for v in found] == [*LAWS] * 2
    for verdict in found:
        assert verdict["status"] == "pass"
        if verdict["law"] in ("oracle", "batch", "continuation"):
            assert 0 < verdict["deviation"] <= verdict["allowed"] == report["allowed"]
    assert {v["deviation"] for v in found if v["law"] == "identity"} == {0.0}


def test_half_precision_is_held_to_its_own_rounding(outcomes: dict[str, Outcome]) -> None:
    report = json.loads(outcomes["half"].out)
    assert outcomes["half"].code == 0
    assert report["dtype"] == "bfloat16"
    assert report["noise_floor"] > 1e-3
    assert {v["status"] for v in report["verdicts"]} == {"pass"}


def test_a_broken_law_is_exit_code_1(outcomes: dict[str, Outcome]) -> None:
    checked = outcomes["flaky"]
    assert checked.code == 1
    assert "FAIL" in checked.out
    assert "other tokens than its own run" in checked.out
    assert "broken" in checked.err
    assert "Traceback" not in checked.err


def test_a_refusal_says_why_and_is_no_failure(outcomes: dict[str, Outcome]) -> None:
    checked = outcomes["refused"]
    assert checked.code == 0, checked.err
    row = next(line for line in checked.out.splitlines() if line.strip().startswith("vtc-cls"))
    assert row.count("refused") == len(LAWS)
    assert "no encoder layer in 40" in checked.out


def test_nothing_checked_is_no_success(outcomes: dict[str, Outcome]) -> None:
    checked = outcomes["all refused"]
    assert checked.code == 2
    assert "no encoder layer in 40" in checked.out
    assert checked.err.splitlines()[-1].startswith("tokensieve: nothing was checked: every law was refused")


def test_a_budget_may_be_for_both_pictures_of_a_prompt(outcomes: dict[str, Outcome]) -> None:
    checked = outcomes["by score"]
    assert checked.code == 0, checked.err
    report = json.loads(checked.out)
    assert report["budget_scope"] == "sample-score"
    statuses = {(v["method"].split("(")[0], v["status"]) for v in report["verdicts"]}
    assert statuses == {("trsm", "pass"), ("vtc-cls", "refused")}


def test_mistakes_are_one_line(outcomes: dict[str, Outcome]) -> None:
    assert "unknown method 'nonsuch'" in outcomes["no method"].refused()
    assert "has no config.json" in outcomes["no model"].refused()
