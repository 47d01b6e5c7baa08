"""Trained methods against the authors' code: the vectors of ``manifest-learned.json``."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaModel

from tests.golden.official import GOLDEN
from tokensieve import parse
from tokensieve.engine.decoder.compute import VisualRows, cut_values, places_of, set_window
from tokensieve.engine.decoder.skip import Skip
from tokensieve.engine.handoff import ImageReduction
from tokensieve.engine.prompt.placeholders import ColumnSelection
from tokensieve.methods import ModelShape
from tokensieve.methods.mqt import place_code
from tokensieve.models import TokenLayout
from tokensieve.ops import soft_top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ByLayer, ConnectorTokens, DecoderTokens, DecoderUserText

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


@pytest.mark.parametrize("case", cases("setok"), ids=["c0", "c1", "c2"])
def test_setok(case):
    h, inputs, outputs = case
    feats, tokens = inputs["feats"][None], outputs["tokens"]
    side = round(feats.shape[1] ** 0.5)
    weights = {}
    for name, rows in state(inputs).items():
        if ".0." in name.split("layers", 1)[-1][2:] or "position" in name:
            continue  # the norm that all layers share stands there again
        weights[name.replace(".1.", ".").replace("mlp.", "")] = rows
    shape = ModelShape("any", tokens.shape[-1], 1, feats.shape[-1])
    method = parse("setok", threshold=h["threshold"], fallback=h["k"])[0]
    net = method.make_net(
        shape, heads=h["heads"], depth=h["inner_layers"], hidden=len(inputs["sd.inner_encoder.mlp.fc1.bias"])
    )
    net.load_state_dict(weights)
    image = ConnectorTokens(
        torch.zeros(1, feats.shape[1], tokens.shape[-1]), grid=(side, side), patches=feats, net=net.eval()
    )
    decision = method(image)[0]
    cluster = outputs["cluster"]
    theirs = [int(cluster[anchor]) for anchor in decision.anchors]  # the authors number clusters by their centres, too
    torch.testing.assert_close(decision.rows, tokens[theirs], atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("case", cases("mqt_resampler"), ids=["c0", "c1", "c2"])
def test_mqt(case):
    h, inputs, outputs = case
    weights, x, out = state(inputs), inputs["x"], outputs["out"]
    torch.testing.assert_close(place_code(h["grid"], x.shape[-1]), weights["pos_embed"])
    method = parse("mqt", keep=h["tokens"])[0]
    net = method.make_net(ModelShape("any", out.shape[-1], 1, x.shape[-1]), queries=h["grid"] ** 2, heads=h["heads"])
    net.load_state_dict(weights)
    net.eval().requires_grad_(False)
    decision = method.reduce(tokens_of(x, tuple(h["target"]), out.shape[-1], net, h["tokens"]))
    torch.testing.assert_close(decision.rows, out, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("case", cases("llavamini_compressor"), ids=["c0", "c1", "c2"])
def test_llava_mini(case):
    """The compressor, before the projector."""
    h, inputs, outputs = case
    weights, x = state(inputs), inputs["x"]
    side, width = round(x.shape[1] ** 0.5), x.shape[-1]
    torch.testing.assert_close(place_code(h["grid"], width), weights["pos_embed"])
    llm = LlamaModel(
        LlamaConfig(vocab_size=2, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    )
    method = parse("llava-mini", keep=h["grid"] ** 2)[0]
    net = method.make_net(ModelShape("any", 4, 1, width), llm=llm, heads=h["heads"]).eval().requires_grad_(False)
    net.compressor.load_state_dict(weights)
    decision = method(replace(tokens_of(x, (side, side), width, net), project=lambda rows: rows))
    torch.testing.assert_close(decision.rows, outputs["out"], atol=3e-5, rtol=1e-5)
    parts = torch.stack([one.matrix() for one in decision])
    torch.testing.assert_close(parts, outputs["attention"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", cases("tokenpacker"), ids=["c0", "c1", "c2"])
def test_tokenpacker(case):
    h, inputs, outputs = case
    x, multi, out = inputs["x"], inputs["multi"], outputs["out"]
    method = parse("tokenpacker", scale=h["scale_factor"], levels=(0, 1, 2, 3))[0]
    shape = ModelShape("any", out.shape[-1], 1, x.shape[-1], multi.shape[-1] // 4)
    net = method.make_net(shape, heads=h["heads"]).eval()
    net.load_state_dict(state(inputs))
    image = tokens_of(x, (h["grid"], h["grid"]), out.shape[-1], net)
    levels = ByLayer(dict(enumerate(multi.chunk(4, -1))))
    decision = method(replace(image, encoder_states=levels))
    torch.testing.assert_close(decision.rows, out, atol=3e-5, rtol=1e-5)


class ToyLayer(nn.Module):
    """The layer of the vectors: a causal mean in the place of attention, and a linear map in that of the MLP."""

    def __init__(self, weights):
        super().__init__()
        self.u, self.mlp = weights["decoder_layer.u.weight"], nn.Linear(*weights["decoder_layer.w.weight"].shape)
        self.mlp.load_state_dict({"weight": weights["decoder_layer.w.weight"]}, strict=False)
        nn.init.zeros_(self.mlp.bias)

    def forward(self, hidden, positions, scale):
        mixed = hidden + (hidden @ self.u.T).cumsum(1) / (positions[..., None] + 1)
        return mixed + scale(torch.tanh(self.mlp(mixed)))


@pytest.mark.parametrize("case", cases("pmod_layer"), ids=["c0", "c1", "c2"])
@torch.no_grad()
def test_p_mod(case):
    h, inputs, outputs = case
    weights, x, visual = state(inputs), inputs["x"], inputs["visual"].bool()
    (method,) = parse("p-mod", shift=h["mean_ratio"])
    shares = outputs["ratios"].where(outputs["ratios"] >= 0, 1.0)  # -1: a plain layer
    torch.testing.assert_close(torch.tensor(method.shares(32)), shares, atol=1e-6, rtol=1e-6)
    routers = method.names_in(f"model.layers.1.{name}" for name in weights)
    net = method.make_net(ModelShape("any", x.shape[-1], 2))
    net.load_state_dict({short: weights[name.removeprefix("model.layers.1.")] for name, short in routers.items()})
    tokens = DecoderTokens(x[visual][None], net=net, layer=1, budget=int(visual.sum() * h["ratio"]))
    decision = method(tokens)[0]
    columns = visual[0].nonzero()[:, 0]
    taking = (~visual).index_put((torch.tensor(0), columns[decision.kept]), torch.tensor(True))
    assert torch.equal(taking, outputs["kept"].bool())
    factors = torch.ones(visual.shape).index_put((torch.tensor(0), columns), method.factors(decision.scores))
    torch.testing.assert_close(factors[visual], outputs["logits_norm"][visual])
    selection = ColumnSelection.of(taking, [int(taking.sum())])
    skip = Skip(x, factors, selection, method.scales)
    out = skip.rejoin(ToyLayer(weights)(selection.take_rows(x), selection.index, skip.scale))
    torch.testing.assert_close(out, outputs["out"], atol=2e-6, rtol=1e-5)


def tokens_of(patches, grid, width, net, budget=0):
    return ConnectorTokens(torch.zeros(*patches.shape[:2], width), grid=grid, patches=patches, net=net, budget=budget)


@pytest.mark.parametrize("case", cases("glimpse_vip"), ids=["c0", "c1", "c2"])
def test_glimpse_prune(case):
    """The logits of the predictor, and the tokens that stay by the authors' rule, with and without their cap."""
    h, inputs, outputs = case
    fuse, beside = inputs["sd.attn_in_proj.bias"], inputs["sd.cond_in_projs.0.bias"]
    levels, total, width = inputs["cond"].shape
    shape = ModelShape("any", 4, 2, tower_width=width, heads=inputs["attn_map"].shape[-1])
    method = parse("glimpse-prune", levels=tuple(range(levels)))[0]
    net = method.make_net(shape, width=len(fuse), beside=len(beside), heads=h["heads"]).eval().requires_grad_(False)
    net.attn_fuser.load_state_dict(state(inputs))
    rows, columns = h["grid"]
    place = torch.arange(total)
    image = DecoderTokens(
        torch.zeros(1, total, 4),
        net=net,
        coordinates=torch.stack([place // columns, place % columns], -1)[None],
        query_attention=inputs["attn_map"].T[None],
        encoder_states=ByLayer({layer: states[None] for layer, states in enumerate(inputs["cond"])}),
    )
    decision = method(image)[0]
    torch.testing.assert_close(decision.scores[None], outputs["logits"], atol=3e-5, rtol=1e-5)
    likely = outputs["logits"][0].sigmoid() > 0.5
    best = outputs["logits"][0].argmax()
    assert decision.kept.tolist() == (likely.nonzero()[:, 0].tolist() or [int(best)])
    capped = replace(method, keep=2)(image)[0]
    most = outputs["logits"][0].topk(max(1, min(2, int(likely.sum())))).indices
    assert capped.kept.tolist() == most.sort().values.tolist()
    assert replace(method, threshold=1.0)(image)[0].kept.tolist() == [int(best)]
    assert (rows * columns, replace(method, threshold=0.0)(image)[0].slots) == (total, total)


@pytest.mark.parametrize("case", cases("yopo"), ids=["c0", "c1", "c2"])
@torch.no_grad()
def test_yopo(case):
    """Zero weights after the softmax are zero values; the window replaces one block of the mask."""
    h, inputs, outputs = case
    (x, side), columns = (inputs["x"], h["side"]), torch.arange(h["START"], h["START"] + h["VISUAL"])
    visual = torch.zeros(x.shape[:2], dtype=torch.bool).index_fill(1, columns, True)
    (method,) = parse("yopo", window=h["window"], cut=h["layercut_num"], mlp=1 / h["mlpcut_ratio"])

    mask, places = inputs["causal"].clone(), places_of(layout_of(side), method)
    set_window(mask[0, 0], columns, places, method.window)
    assert torch.equal(mask == 0, outputs["mask"] == 0)
    assert bool((mask[mask != 0] <= torch.finfo(mask.dtype).min).all())

    mlp = GatedMlp(x.shape[-1], len(inputs["sd.gate_proj.weight"]))
    mlp.load_state_dict(state(inputs))
    rows = VisualRows.of(visual)
    others = rows.split(mlp, x, int(method.mlp * mlp.gate_proj.out_features))
    torch.testing.assert_close(rows.join(mlp(others), x.shape), outputs["mlp_out"], atol=1e-6, rtol=1e-5)

    counting = inputs["headmask"].bool()
    counting[method.first_cut(len(counting)) :] = False
    attention, heads = inputs["attention"], len(counting[0])
    values = torch.randn(1, x.shape[1], 6 * heads, generator=torch.Generator().manual_seed(0))
    cut = cut_values(values, visual, counting[h["layer"]])
    by_head, cut_by_head = (rows.view(1, -1, heads, 6).transpose(1, 2) for rows in (values, cut))
    torch.testing.assert_close(attention @ cut_by_head, outputs["attention_cut"] @ by_head, atol=1e-6, rtol=1e-5)


def layout_of(side):
    layout = TokenLayout.grid_of(side, side)
    whole = Reduction.identity(side * side)
    return ImageReduction(layout, whole, whole)


class GatedMlp(nn.Module):
    """The MLP of a Llama."""

    def __init__(self, width, neurons):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, neurons, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(neurons, width, bias=False), nn.SiLU()

    def forward(self, rows):
        return self.down_proj(self.act_fn(self.gate_proj(rows)) * self.up_proj(rows))
