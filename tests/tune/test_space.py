"""The configurations of a search."""

import json

import pytest

from tokensieve import Refusal
from tokensieve.methods.spec_file import DEFAULTS, SpecFile
from tokensieve.tune.space import attachable, space


def keys(*arguments, **options):
    return [candidate.run.key for candidate in space(*arguments, **options)]


def test_each_method_at_each_budget_comes_first_and_departures_change_one_thing():
    found = keys(["divprune", "trsm"], [0.5, 16])
    assert found[:4] == ["divprune(keep=0.5)", "divprune(keep=16)", "trsm(keep=0.5)", "trsm(keep=16)"]
    assert set(found[4:]) == {
        "divprune(keep=0.5) positions=contiguous",
        "divprune(keep=16) positions=contiguous",
        "downsample(keep=0.5) + divprune(keep=0.5)",
        "downsample(keep=0.5) + divprune(keep=16)",
        "trsm(keep=0.5) positions=contiguous",
        "trsm(keep=16) positions=contiguous",
        "trsm(keep=0.5, query='prompt')",
        "trsm(keep=16, query='prompt')",
        "downsample(keep=0.5) + trsm(keep=0.5)",
        "downsample(keep=0.5) + trsm(keep=16)",
    }


def test_inside_the_llm_the_layer_is_varied_and_another_stage_stands_in_front():
    found = keys(["fastv"], [36])
    assert {"fastv(keep=36, layer=1)", "fastv(keep=36, layer=4)", "divprune(keep=0.5) + fastv(keep=36)"} <= set(found)


def test_parameters_and_budgets_that_a_spec_gives_are_not_varied():
    assert set(keys(["trsm(query='prompt', keep=9)"], [0.5, 16])) == {
        "trsm(keep=9, query='prompt')",
        "trsm(keep=9, query='prompt') positions=contiguous",
        "downsample(keep=0.5) + trsm(keep=9, query='prompt')",
    }
    assert set(keys(["downsample + divprune(keep=9)"], [16])) == {
        "downsample(keep=16) + divprune(keep=9)",
        "downsample(keep=16) + divprune(keep=9) positions=contiguous",
    }


def test_a_spec_file_stands_for_the_spec_inside(tmp_path):
    file = tmp_path / "best.json"
    file.write_text(json.dumps(SpecFile("trsm", 36).to_json()))
    assert keys([str(file)], [0.5]) == keys(["trsm(keep=36)"], [0.5])
    file.write_text(json.dumps(SpecFile("trsm", 36, {**DEFAULTS, "separators": "none"}).to_json()))
    with pytest.raises(Refusal, match=r"best.json says separators='none', which cannot be set here"):
        space([str(file)], [0.5])


def test_a_method_without_a_budget_is_tried_once():
    assert keys(["setok-cluster"], [0.5, 16])[0] == "setok-cluster"
    assert len([key for key in keys(["setok-cluster"], [0.5, 16]) if key == "setok-cluster"]) == 1


def test_trials_bound_the_space_and_the_seed_orders_its_departures():
    whole = keys(["trsm", "scope"], [0.5])
    assert keys(["trsm", "scope"], [0.5], trials=3) == whole[:3]
    others = [keys(["trsm", "scope"], [0.5], seed=seed) for seed in range(1, 5)]
    assert all(set(other) == set(whole) for other in others)
    assert any(other != whole for other in others)


def test_all_is_every_method_with_a_budget_and_nothing_is_tried_twice():
    found = keys(["all", "vtc-cls", "full"], [0.5])
    assert {"vtc-cls(keep=0.5)", "pyramiddrop(keep=0.5)", "tome(keep=0.5)"} <= set(found)
    assert len(found) == len(set(found)) > 60
    assert not any(key.startswith(("random", "full")) for key in found)


@pytest.mark.parametrize(("methods", "keeps"), [([], [0.5]), (["vtc-cls"], []), (["vtc-clz"], [0.5])])
def test_a_space_of_nothing_is_refused(methods, keeps):
    with pytest.raises(Refusal, match=r"needs a method and a budget|did you mean vtc-cls"):
        space(methods, keeps)


def test_methods_that_the_model_cannot_run_are_listed_with_the_reason():
    from tokensieve.reference.model import build_model

    candidates = space(["vtc-cls", "evs"], [0.5])
    possible, refused = attachable(build_model().eval(), candidates)
    assert {candidate.method for candidate in possible} >= {"vtc-cls"}
    assert "videos" in refused["evs"]
    assert not any("evs" in candidate.run.key for candidate in possible)


def test_parameters_of_training_are_not_varied():
    texts = [candidate.method for candidate in space(["visionselector"], [0.25])]
    assert "downsample(keep=0.5) + visionselector" in texts
    assert not any("softened" in text for text in texts)
