"""Nets of trained methods: beside the model, in folders without code, and refused where they do not fit."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokensieve
from tests.support import models, prompts
from tests.support.oracle import NOISE
from tokensieve import Refusal, parse
from tokensieve.engine.nets import load_net, read_about, save_net, shape_of
from tokensieve.methods import ModelShape
from tokensieve.vllm.settings import unserved

SPECS = ("visionselector(weights='random', keep=5)", "dyvte(weights='random')")
FAMILY = "llava-clip"


def inputs(kind="ragged", family=FAMILY):
    return prompts.collate(family, prompts.batch(family, kind))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl"])
def test_the_model_does_not_know_the_net(family, spec):
    model = models.tiny_model(family)
    before, names = models.footprint(model), list(model.state_dict())
    with tokensieve.attach(model, spec) as sieve:
        (net,) = sieve.nets.values()
        model.generate(**inputs(family=family), max_new_tokens=2)
        assert list(model.state_dict()) == names
        assert not {id(p) for p in net.parameters()} & {id(p) for p in model.parameters()}
        assert not any(p.requires_grad for p in net.parameters())
    assert models.footprint(model) == before


def test_the_net_is_float32_whatever_the_model_is():
    model = models.build(FAMILY).to(torch.bfloat16)
    batch = {name: rows.bfloat16() if rows.is_floating_point() else rows for name, rows in inputs().items()}
    with torch.no_grad(), tokensieve.attach(model, SPECS[0]) as sieve:
        model(**batch)
        scores = [decision.scores for row in sieve.last for decision in row if decision.scores is not None]
    assert scores
    assert {rows.dtype for rows in scores} == {torch.float32}
    assert {p.dtype for p in sieve.nets["connector"].parameters()} == {torch.float32}


@pytest.fixture
def folder(tmp_path):
    """A folder of a net whose weights differ from those of "random"."""
    shape, method = shape_of(models.tiny_model(FAMILY)), parse(SPECS[0])[0]
    torch.manual_seed(5)
    net = method.make_net(shape, width=3)
    save_net(tmp_path / "net", method, shape, net, {"net": {"width": 3}, "metrics": {"accuracy": 0.5}})
    return tmp_path / "net"


def test_a_folder_gives_the_same_scores(folder):
    model, method = models.tiny_model(FAMILY), parse("visionselector", weights=str(folder), keep=5)[0]
    with torch.no_grad(), tokensieve.attach(model, method) as sieve:
        model(**inputs())
        chosen, net = sieve.last, sieve.nets["connector"]
    assert net.q_proj.weight.shape[0] == 3
    assert read_about(folder)["metrics"] == {"accuracy": 0.5}
    assert parse(str(method)) == [method]
    with torch.no_grad(), tokensieve.attach(model, SPECS[0]) as sieve:
        model(**inputs())
        assert [d.kept.tolist() for d in sieve.last[0]] != [d.kept.tolist() for d in chosen[0]]


def changed(folder, **values):
    about = json.loads((folder / "method.json").read_text())
    (folder / "method.json").write_text(json.dumps(about | values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": {"type": "llava", "width": 8, "layers": 4}},
            "fit llava of width 8 with 4 LLM layers; this model is",
        ),
        ({"model": {"type": "llava"}}, "must name the method, the net and the model"),
        ({"method": "dyvte"}, "are those of dyvte; got visionselector"),
        ({"format": 2}, "has format 2; this Tokensieve reads format 1"),
        ({"net": {"width": 4}}, "is not a net of visionselector"),
        ({"net": {"depth": 4}}, "is not a net of visionselector"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, change, message):
    model = models.tiny_model(FAMILY)
    before = models.footprint(model)
    changed(folder, **change)
    with pytest.raises(Refusal, match=re.escape(message)) as caught:
        tokensieve.attach(model, "visionselector", weights=str(folder))
    assert "\n" not in str(caught.value)
    assert models.footprint(model) == before


class Trap:
    """Unpickling it would fail the test."""

    def __reduce__(self):
        return pytest.fail, ("something was executed",)


def test_nothing_is_executed(folder):
    (folder / "net.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(Refusal, match="is not a net of visionselector"):
        load_net(parse("visionselector", weights=str(folder))[0], shape_of(models.tiny_model(FAMILY)))


def test_damaged_parameters_are_named(folder):
    method, shape = parse("visionselector", weights=str(folder))[0], shape_of(models.tiny_model(FAMILY))
    parameters = load_file(folder / "net.safetensors")
    save_file({name: torch.full_like(rows, torch.nan) for name, rows in parameters.items()}, folder / "net.safetensors")
    with pytest.raises(Refusal, match=r"a training that diverged: \S+ is not finite"):
        load_net(method, shape)
    save_file({name: torch.cat([rows, rows]) for name, rows in parameters.items()}, folder / "net.safetensors")
    with pytest.raises(Refusal, match="is not a net of visionselector: size mismatch for"):
        load_net(method, shape)


def test_other_folders_are_refused(tmp_path):
    shape = ModelShape("llava", 8, 2)
    with pytest.raises(Refusal, match=r"it has no method\.json"):
        load_net(parse("dyvte", weights=str(tmp_path))[0], shape)
    with pytest.raises(Refusal, match="has no weights of visionselector"):
        load_net(parse("visionselector", weights=str(tmp_path))[0], shape)
    with pytest.raises(Refusal, match=r"no weights of dyvte at .*: no such folder"):
        load_net(parse("dyvte", weights=str(tmp_path / "runs"))[0], shape)
    (tmp_path / "method.json").write_text("[]")
    with pytest.raises(Refusal, match=r"no weights of dyvte at .*method\.json: not a folder"):
        load_net(parse("dyvte", weights=str(tmp_path / "method.json"))[0], shape)
    with pytest.raises(Refusal, match="has format 'list'"):
        load_net(parse("visionselector", weights=str(tmp_path))[0], shape)
    (tmp_path / "method.json").write_text("{")
    with pytest.raises(Refusal, match="cannot read"):
        load_net(parse("visionselector", weights=str(tmp_path))[0], shape)


def test_trained_methods_of_two_stages(deviation):
    """Scores and gates act together, and replaying their decisions gives the same logits."""
    model = models.tiny_model(FAMILY)
    with torch.no_grad(), tokensieve.attach(model, f"{SPECS[0]} + fastv(keep=2, layer=1)") as sieve:
        logits = model(**inputs("single")).logits[:, -1]
        assert sieve.tokens[0][0] == [5, *[2] * (len(sieve.tokens[0][0]) - 1)]
    with torch.no_grad(), tokensieve.attach(model, SPECS[0]) as sieve:
        selected = model(**inputs("single")).logits[:, -1]
        decisions = sieve.last
    with torch.no_grad(), tokensieve.attach(model, decisions):
        assert deviation("of a replay", model(**inputs("single")).logits[:, -1], selected) <= NOISE
    assert not torch.equal(logits, selected)


@pytest.mark.parametrize("spec", SPECS)
def test_a_paused_method_leaves_the_model_alone(spec):
    model, batch = models.tiny_model(FAMILY), inputs()
    with torch.no_grad():
        whole = model(**batch).logits
        with tokensieve.attach(model, spec) as sieve:
            model(**batch)
            decisions = sieve.last
            with sieve.paused():
                assert torch.equal(model(**batch).logits, whole)
            assert sieve.last is decisions
            model(**batch)
            assert [len(row) for row in sieve.last] == [len(row) for row in decisions]


@pytest.mark.parametrize("leave", [True, False])
def test_gates_decide_about_all_tokens_of_a_prompt(leave):
    model, batch = models.tiny_model(FAMILY), inputs("two-images")
    with torch.no_grad():
        whole = model(**batch).logits[:, -1]
        with tokensieve.attach(model, "dyvte", weights="random", threshold=-1e9 if leave else 1e9) as sieve:
            early = model(**batch).logits[:, -1]
    for images in sieve.tokens:
        for entered, *later in images:
            assert entered > 0
            assert set(later) == {0 if leave else entered}
    assert torch.equal(early, whole) != leave


def test_engines_of_vllm_refuse_a_net():
    assert "its trained net" in unserved(parse(SPECS[0])[0])


def test_a_softened_decision_keeps_every_row():
    model, batch = models.tiny_model(FAMILY), inputs("single")
    with tokensieve.attach(model, SPECS[0]) as sieve:
        sieve.nets["connector"].train().requires_grad_(True)
        out = model(**batch, labels=batch["input_ids"])
        ((decision,),) = sieve.last
        assert decision.slots == decision.total
        assert abs(float(decision.mixing.weight.detach().sum()) - 5) < 1e-4
        assert out.logits.shape[1] == batch["input_ids"].shape[1]
        (out.loss + sieve.methods[0].objective([decision], 1.0)).backward()
        moved = {name: float(p.grad.abs().max()) for name, p in sieve.nets["connector"].named_parameters()}
    model.zero_grad()  # other tests share the model
    # a constant added to all scores changes no factor, and that is all the bias of the queries does
    assert all(value > 1e-9 for name, value in moved.items() if name != "q_proj.bias"), moved
    assert model.training is False


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_the_authors_checkpoint(tmp_path, prefix):
    """A whole model in two files, whose vision encoder holds the scorer."""
    shape, torch_dtype = ModelShape("qwen2_5_vl", 8, 2), torch.bfloat16
    scorer = {f"{name}.weight": torch.randn(6, 8) for name in ("q_proj", "k_proj")}
    scorer |= {f"{name}.bias": torch.randn(6) for name in ("q_proj", "k_proj")}
    stored = {f"{prefix}importance_scorer.{name}": rows.to(torch_dtype) for name, rows in scorer.items()}
    half = {name: rows for name, rows in stored.items() if "q_proj" in name}
    save_file({"lm_head.weight": torch.zeros(3, 8), **half}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: r for n, r in stored.items() if n not in half}, tmp_path / "model-00002-of-00002.safetensors")
    method = parse("visionselector", weights=str(tmp_path))[0]
    net = load_net(method, shape)
    assert {name: rows.shape for name, rows in net.state_dict().items()} == {n: r.shape for n, r in scorer.items()}
    for name, rows in net.state_dict().items():
        assert torch.equal(rows, scorer[name].to(torch_dtype).float())
    with pytest.raises(Refusal, match="does not fit visionselector and qwen2_5_vl of width 9"):
        load_net(method, ModelShape("qwen2_5_vl", 9, 2))


def test_the_scorer_that_angelslim_publishes(tmp_path):
    """The scorer alone, with the prefixes that training frameworks leave; code beside it is never imported."""
    scorer = {f"{name}.weight": torch.randn(6, 8) for name in ("q_proj", "k_proj")}
    scorer |= {f"{name}.bias": torch.randn(6) for name in ("q_proj", "k_proj")}
    (tmp_path / "config.json").write_text('{"architecture": "TransformerScorer", "in_features": 8, "hidden_dim": 6}')
    (tmp_path / "modeling.py").write_text("raise AssertionError('something was executed')")
    shape = ModelShape("qwen2_5_vl", 8, 2)
    for prefix in ("", "module.", "visual.importance_scorer."):
        save_file({prefix + name: rows for name, rows in scorer.items()}, tmp_path / "model.safetensors")
        for method in ("idpruner", "visionselector"):
            net = load_net(parse(method, weights=str(tmp_path))[0], shape)
            assert {name: rows.tolist() for name, rows in net.state_dict().items()} == {
                name: rows.tolist() for name, rows in scorer.items()
            }
    save_file(
        {"q_proj.weight": torch.zeros(6, 8), "text_proj.weight": torch.zeros(6, 8)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(Refusal, match="does not fit idpruner and qwen2_5_vl of width 8"):
        load_net(parse("idpruner", weights=str(tmp_path))[0], shape)
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(6, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match="has no weights of idpruner"):
        load_net(parse("idpruner", weights=str(tmp_path))[0], shape)


def test_idpruner_reads_the_folders_of_visionselector(folder):
    model = models.tiny_model(FAMILY)
    with torch.no_grad(), tokensieve.attach(model, "idpruner", weights=str(folder), keep=5, balance=1.0) as sieve:
        model(**inputs())
        ranked = [decision.kept.tolist() for row in sieve.last for decision in row]
    with torch.no_grad(), tokensieve.attach(model, "visionselector", weights=str(folder), keep=5) as sieve:
        model(**inputs())
        assert [decision.kept.tolist() for row in sieve.last for decision in row] == ranked
    with tokensieve.attach(model, "idpruner") as sieve:
        assert not sieve.nets


def test_engines_of_vllm_serve_idpruner_without_a_net():
    assert unserved(parse("idpruner")[0]) is None
    assert "its trained net" in unserved(parse("idpruner(weights='random')")[0])
