"""Nonsense on the command line is refused before Ray starts; cores and GPUs are shared out without overlap."""

import pytest
from typer.testing import CliRunner

from tests.cli.calling import run_many
from tokensieve import batch
from tokensieve.batch import Place, vllm
from tokensieve.batch.rounds import Share, share_of
from tokensieve.cli import app
from tokensieve.errors import Refusal

WRONG = {
    "no method": ("--methods", "vtc-cls,", "a method is missing"),
    "unknown method": ("--methods", "vtc-csl", "vtc-cls"),
    "bad budget": ("--keep", "lots", "lots"),
    "no such data": ("--data", "nowhere.jsonl", "no such file"),
    "no such model": ("--model", "./nowhere", "no model at ./nowhere"),
    "no question": ("--prompt", "look", "{question}"),
    "unknown metric": ("--metric", "exactly", "exact"),
    "one GPU of many": ("--device", "cuda:1", "Ray gives each worker its GPUs"),
    "no vLLM": ("--engine", "vllm", "vllm"),
    "workers": ("--workers", "0", "workers"),
    "format": ("--format", "csv", "jsonl"),
    "output": (),
}


def test_wrong_options_are_one_line(tmp_path):
    calls = {
        name: ["batch", "--data", "reference", "--output", tmp_path / "out", *wrong[:2]]
        for name, wrong in WRONG.items()
    }
    calls["output"] = ["batch", "--data", "reference"]
    elsewhere = ["batch", "--data", "reference", "--output", tmp_path / "other", "--address", "127.0.0.1:1"]
    outcomes = run_many({**calls, "cluster": elsewhere})
    assert "no Ray cluster at 127.0.0.1:1" in outcomes["cluster"].refused()
    for name, wrong in WRONG.items():
        line = outcomes[name].refused()
        assert (wrong[2] if wrong else "--output") in line, name
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("methods", "engine", "separators"),
    [("vtc-cls", "vllm", "none"), ("fastv", "transformers", "kept-lines")],
)
def test_where_vllm_cannot_serve_a_method_the_job_is_that_of_transformers(
    tmp_path, monkeypatch, methods, engine, separators
):
    jobs = []

    def started(job, *_):
        jobs.append(job)
        raise Refusal("not started")

    monkeypatch.setattr(vllm, "available", lambda: True)
    monkeypatch.setattr(batch, "run", started)
    call = ["batch", "--data", "reference", "--output", str(tmp_path), "--methods", methods]
    assert CliRunner().invoke(app, call).exit_code != 0
    assert [(job.engine, job.settings.separators) for job in jobs] == [(engine, separators)]


@pytest.mark.parametrize(
    ("place", "nodes", "share"),
    [
        (Place(), [{"CPU": 2}], Share(1, 2, 2, 0)),
        (Place(), [{"CPU": 16}], Share(4, 4, 4, 0)),
        (Place(), [{"CPU": 16}, {"CPU": 2}], Share(9, 2, 2, 0)),
        (Place(workers=2), [{"CPU": 2}], Share(2, 1, 1, 0)),
        (Place(workers=4), [{"CPU": 2}], Share(4, 0.5, 1, 0)),
        (Place(workers=3), [{"CPU": 4}, {"CPU": 4}], Share(3, 2, 2, 0)),
        (Place(), [{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}], Share(8, 1, 4, 1)),
        (Place(gpus_per_worker=2), [{"CPU": 16, "GPU": 3}, {"CPU": 16, "GPU": 4}], Share(3, 1, 4, 2)),
        (Place(gpus_per_worker=0.5, workers=2), [{"CPU": 2, "GPU": 1}], Share(2, 1, 1, 0.5)),
        (Place(gpus_per_worker=0), [{"CPU": 8, "GPU": 1}], Share(2, 4, 4, 0)),
    ],
)
def test_no_core_and_no_gpu_is_used_twice(place, nodes, share):
    assert share_of(place, nodes) == share
    assert share.workers * share.cpus <= sum(node["CPU"] for node in nodes)
    assert share.workers * share.gpus <= sum(node.get("GPU", 0) for node in nodes)


@pytest.mark.parametrize(
    ("place", "nodes"),
    [
        (Place(gpus_per_worker=1), [{"CPU": 2}]),
        (Place(gpus_per_worker=2), [{"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}]),
        (Place(workers=3), [{"CPU": 4, "GPU": 2}]),
        (Place(), [{}]),
    ],
)
def test_more_than_there_is_is_refused(place, nodes):
    with pytest.raises(Refusal):
        share_of(place, nodes)
