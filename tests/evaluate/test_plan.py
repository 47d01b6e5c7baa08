"""Settings, and the runs of methods × budgets × seeds."""

from dataclasses import FrozenInstanceError

import pytest

from tokensieve import Refusal, list_methods
from tokensieve.evaluate.plan import Settings, is_random_baseline, plan


def keys(entries):
    return {(entry.method, entry.keep): [run.key for run in entry.runs] for entry in entries}


def test_rows_and_runs():
    found = keys(plan(["vtc-cls", "random", "full"], [64, 0.25], seeds=3, oracle=False))
    assert list(found) == [("full", None), ("vtc-cls", 64), ("vtc-cls", 0.25), ("random", 64), ("random", 0.25)]
    assert found["vtc-cls", 0.25] == ["vtc-cls(keep=0.25)"]
    assert found["random", 64] == ["random(keep=64)", "random(keep=64, seed=1)", "random(keep=64, seed=2)"]


def test_what_a_spec_gives_is_not_varied():
    found = keys(
        plan(["random(keep=9, seed=4)", "random(seed=5)", "vtc-cls( keep=7)"], [64, 32], seeds=2, oracle=False)
    )
    assert found == {
        ("full", None): ["full"],
        ("random(keep=9, seed=4)", 9): ["random(keep=9, seed=4)"],
        ("random(seed=5)", 64): ["random(keep=64, seed=5)"],
        ("random(seed=5)", 32): ["random(keep=32, seed=5)"],
        ("vtc-cls( keep=7)", 7): ["vtc-cls(keep=7)"],
    }


def test_stages_share_an_open_budget_and_keep_their_own():
    found = keys(plan(["downsample(keep=0.5) + uniform"], [8], seeds=1, oracle=False))
    assert found["downsample(keep=0.5) + uniform", 8] == ["downsample(keep=0.5) + uniform(keep=8)"]


def test_average_budgets_reach_the_methods_that_know_them():
    specs = ["fastv(layer=1)", "uniform", "vtw", "fastv(average=70)"]
    found = keys(plan(specs, [72, 0.4], seeds=1, oracle=False, keep_means="average"))
    assert found["fastv(layer=1)", 72] == ["fastv(keep=0.5, average=72, layer=1)"]
    assert found["fastv(layer=1)", 0.4] == ["fastv(keep=0.5, average=0.4, layer=1)"]
    assert found["uniform", 72] == ["uniform(keep=72)"]
    assert found["vtw", None] == ["vtw"]
    assert found["fastv(average=70)", 70] == ["fastv(keep=0.5, average=70)"]
    pipelines = ["uniform + fastv", "uniform(keep=9) + fastv"]
    found = keys(plan(pipelines, [72, 0.4], seeds=1, oracle=False, keep_means="average"))
    assert found["uniform + fastv", 72] == ["uniform(keep='layers:72') + fastv(keep='layers:72')"]
    assert found["uniform + fastv", 0.4] == ["uniform(keep='layers:0.4') + fastv(keep='layers:0.4')"]
    assert found["uniform(keep=9) + fastv", 72] == ["uniform(keep=9) + fastv(keep=0.5, average=72)"]
    with pytest.raises(ValueError, match="is for budgets that are numbers; got 'average:8'"):
        plan(["uniform"], ["average:8"], seeds=1, oracle=False, keep_means="average")
    with pytest.raises(ValueError, match="'final' or 'average'"):
        plan(["uniform"], [8], seeds=1, oracle=False, keep_means="mean")


def test_without_budgets_a_method_runs_at_its_default():
    assert ("uniform", 0.25) in keys(plan(["uniform"], [], seeds=1, oracle=False))


def test_the_oracle_comes_last_at_every_budget():
    assert list(keys(plan(["uniform"], [8, 4], seeds=1, oracle=True)))[-2:] == [("oracle", 8), ("oracle", 4)]


def test_repeated_rows_run_once():
    assert len(plan(["uniform", "uniform(keep=8)", "uniform"], [8], seeds=1, oracle=False)) == 2


@pytest.mark.parametrize(
    ("methods", "keeps", "seeds", "message"),
    [
        (["vtc-clss"], [8], 1, "did you mean vtc-cls"),
        (["uniform"], [0], 1, "keep must be .*; got 0"),
        (["uniform"], [1.5], 1, "keep must be .*; got 1.5"),
        (["uniform(kep=3)"], [8], 1, "no parameter 'kep'"),
        (["uniform"], [8], 0, "seeds must be at least 1; got 0"),
    ],
)
def test_mistakes_are_named(methods, keeps, seeds, message):
    with pytest.raises(ValueError, match=message):
        plan(methods, keeps, seeds=seeds, oracle=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "exactly"}, "unknown metric 'exactly'; did you mean exact"),
        ({"batch_size": 0}, "batch_size must be 'auto' or a number of at least 1; got 0"),
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"keep_means": "mean"}, "keep_means must be 'final' or 'average'; got 'mean'"),
        ({"prompt": "what?"}, "the prompt must contain {question}"),
    ],
)
def test_settings_are_validated_on_creation(options, message):
    with pytest.raises(Refusal, match=message):
        Settings(**options)


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        Settings().batch_size = 4


def test_the_random_baseline_is_known_by_its_seed():
    assert [info.name for info in list_methods() if is_random_baseline(info)] == ["random"]


def test_an_edited_method_file_makes_new_predictions(tmp_path):
    source = """
from dataclasses import dataclass
from tokensieve import Method, register

@register("mine-{0}", paper="none")
@dataclass(frozen=True)
class Mine(Method):
    keep: int = 4
    def reduce(self, image):
        return image.keep(None)
"""
    found = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.py"
        path.write_text(source.format(name))
        (run,) = plan([f"{path}:Mine"], [4], seeds=1, oracle=False)[1].runs
        found.append(run.key)
    assert found[0].startswith("mine-one(keep=4) #")
    assert found[0].split("#")[1] != found[1].split("#")[1]


def test_other_weights_in_a_folder_make_new_predictions(tmp_path):
    found = []
    for rows in (b"before", b"after", b"before"):
        (tmp_path / "net.safetensors").write_bytes(rows)
        (run,) = plan([f"visionselector(weights={str(tmp_path)!r})"], [4], seeds=1, oracle=False)[1].runs
        found.append(run.key.partition(" #")[2])
    assert len(found[0]) == 8
    assert found[0] == found[2] != found[1]
    (bundled,) = plan(["visionselector"], [4], seeds=1, oracle=False)[1].runs
    assert "#" not in bundled.key
