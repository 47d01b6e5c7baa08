"""Trained methods against the authors' code: the vectors of ``manifest-learned.json``."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.golden.official import GOLDEN
from tokensieve import parse
from tokensieve.methods import ModelShape
from tokensieve.ops import soft_top_k
from tokensieve.tokens import ConnectorTokens, DecoderTokens, DecoderUserText

METHODS = {entry["method"]: entry for entry in json.loads((GOLDEN / "manifest-learned.json").read_text())["methods"]}


def cases(method):
    """Return (hyperparameters, inputs, outputs) of each case of a method."""
    tensors = load_file(GOLDEN / METHODS[method]["file"])

    def part(case, name):
        prefix = f"{method}/{case}/{name}/"
        return {key.removeprefix(prefix): rows for key, rows in tensors.items() if key.startswith(prefix)}

    listed = METHODS[method]["cases"]
    return [(c["hyperparameters"], part(c["case"], "in"), part(c["case"], "out")) for c in listed]


def state(inputs, prefix=""):
    return {prefix + name.removeprefix("sd."): rows for name, rows in inputs.items() if name.startswith("sd.")}


@pytest.mark.parametrize("case", cases("visionselector"), ids=["c0", "c1", "c2"])
def test_visionselector(case):
    h, inputs, outputs = case
    method = parse("visionselector", keep=h["K"], first=1.0, last=1.0)[0]
    net = method.make_net(ModelShape("any", inputs["x"].shape[-1], 1), width=h["hidden_dim"]).eval()
    net.load_state_dict(state(inputs))
    decision = method(ConnectorTokens(inputs["x"], net=net))
    torch.testing.assert_close(decision.scores, outputs["scores"], atol=2e-5, rtol=1e-5)
    assert torch.equal(decision.kept, outputs["kept"])
    scores = outputs["scores"].clone().requires_grad_()
    soft = soft_top_k(scores, h["K"])
    torch.testing.assert_close(soft, outputs["soft"], atol=1e-6, rtol=1e-5)
    soft.backward(inputs["grad_out"])
    torch.testing.assert_close(scores.grad, outputs["soft_grad"], atol=1e-6, rtol=1e-5)
    softened = method(ConnectorTokens(inputs["x"], net=net.train()))
    constraint = method.objective(list(softened), 0.5)
    torch.testing.assert_close(constraint, outputs["constraint"][0], atol=1e-5, rtol=1e-5)
    rows = inputs["x"] * outputs["soft"][..., None]
    torch.testing.assert_close(softened.apply(inputs["x"]), rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", cases("dyvte_gate"), ids=["c0", "c1", "c2"])
def test_dyvte_gate(case):
    h, inputs, outputs = case
    hidden, visual = inputs["hidden"], slice(h["START"], h["START"] + h["VISUAL"])
    text = hidden[:, visual.stop :]
    method = parse("dyvte")[0]
    weights = state(inputs, "0.")
    net = method.make_net(ModelShape("any", hidden.shape[-1], 2), width=len(weights["0.w1.weight"])).eval()
    net.load_state_dict(weights)
    asked = []
    net[0].register_forward_hook(lambda _, args, logits: asked.append((args[0][0], logits[0])))
    words = DecoderUserText(text, torch.ones(text.shape[:2], dtype=torch.bool))
    decision = method(DecoderTokens(hidden[:, visual], net=net, layer=1, user_text=words))[0]
    torch.testing.assert_close(asked[0][0], outputs["feat"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(asked[0][1], outputs["gate_logits"], atol=2e-5, rtol=1e-5)
    assert decision.slots == (0 if int(outputs["exit"]) else h["VISUAL"])
    left = torch.cat([hidden[0, : visual.start], decision.apply(hidden[0, visual]), text[0]])
    assert torch.equal(left, outputs["hidden_after"][0])


@pytest.mark.parametrize("case", cases("dyvte_label"), ids=["c0", "c1", "c2"])
def test_dyvte_label(case):
    _, inputs, outputs = case
    labels = inputs["labels"][:, 1:]
    labels = labels.where(labels != 0, -100)  # the authors do not count the word with the id 0; their losses do
    whole, early = (inputs[name][:, :-1] for name in ("ori_logits", "logits"))
    method = parse("dyvte(tolerance='ratio')")[0]
    assert method.may_leave(whole, early, labels).long().tolist() == outputs["gate_labels"].tolist()
    agrees = parse("dyvte(tolerance='agree')")[0].may_leave(whole, early, labels)
    assert bool((agrees | (outputs["gate_labels"] == 0)).all())


@pytest.mark.parametrize("case", cases("setok"), ids=["c0", "c1", "c2"])
def test_setok_cluster(case):
    h, inputs, outputs = case
    feats = inputs["feats"][None]
    side = round(feats.shape[1] ** 0.5)
    method = parse("setok-cluster", threshold=h["threshold"], fallback=h["k"])[0]
    decision = method(ConnectorTokens(feats, grid=(side, side), patches=feats))
    # the authors add noise up to 1e-6 to the densities
    torch.testing.assert_close(decision.scores, outputs["score"], atol=2e-5, rtol=1e-5)
    cluster = outputs["cluster"]
    for number in range(int(cluster.max()) + 1):  # the authors number clusters by falling score, here by place
        assert len(set(decision[0].source[cluster == number].tolist())) == 1
    assert decision[0].slots == int(cluster.max()) + 1
