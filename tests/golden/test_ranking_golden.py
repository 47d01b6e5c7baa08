"""Methods of 2025 and 2026 against their authors' code on 24×24 tokens; ``make_ranking.py`` made the vectors."""

import torch

from tests.golden import make_idpruner, make_prunesid
from tests.golden.drawn import clustered, received
from tests.golden.vectors import CLOSE, cases, load
from tokensieve import parse
from tokensieve.methods import ModelShape
from tokensieve.tokens import ByLayer, ConnectorTokens, DecoderTokens


def one(spec: str, **parameters):
    (method,) = parse(spec, **parameters)
    return method


def kept_mask(reduction) -> torch.Tensor:
    """Return the mask of the places that stay, `[B, N]`."""
    return reduction.matrix().new_zeros(len(reduction.anchors), reduction.total).scatter(1, reduction.anchors, 1).bool()


def hiprune_image(h) -> ConnectorTokens:
    rows = {layer: received(h["seed"] + i, h["batch"], h.get("levels", 0)) for i, layer in enumerate((8, 22))}
    return ConnectorTokens(torch.zeros(h["batch"], 576, 1), attention_received=ByLayer(rows, 24), grid=(24, 24))


@cases("hiprune")
def test_hiprune(name):
    _, expected, h = load("hiprune", name)
    method = one("hiprune", keep=h["keep"], alpha=h["alpha"], official_borders=True)
    assert torch.equal(kept_mask(method(hiprune_image(h))), expected["kept"])


@cases("hiprune")
def test_hiprune_without_the_official_borders(name):
    """Only neighbours on the grid: as many tokens stay, and the others are those of the deep layer."""
    *_, h = load("hiprune", name)
    image = hiprune_image(h)
    ours = kept_mask(one("hiprune", keep=h["keep"], alpha=h["alpha"])(image))
    assert ours.sum(-1).tolist() == [h["keep"]] * h["batch"]
    anchors = image.attention_received[8].topk(round(h["keep"] * h["alpha"] / 5)).indices
    for i, places in enumerate(anchors.tolist()):
        near = {(p // 24 + y, p % 24 + x) for p in places for y, x in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))}
        near = {y * 24 + x for y, x in near if 0 <= y < 24 and 0 <= x < 24}
        deep = image.attention_received[22][i].index_fill(0, torch.tensor(sorted(near)), -1)
        others = deep.topk(h["keep"] - len(near)).indices.tolist()
        assert set(ours[i].nonzero().flatten().tolist()) == near | set(others)


@cases("otprune")
def test_otprune(name):
    _, expected, h = load("otprune", name)
    image = ConnectorTokens(clustered(h["seed"], h["tokens"], h["width"], h["clusters"])[None])
    assert one("otprune", keep=h["keep"])(image)[0].kept.tolist() == expected["kept"].tolist()


@cases("apet")
def test_apet(name):
    _, expected, h = load("apet", name)
    rows = clustered(h["seed"], 576, h["width"], h["clusters"])
    image = ConnectorTokens(rows[None], patches=rows[None])
    official, ours = (
        one("apet", keep=h["keep"], basis=h["basis"], official_places=places)(image)[0] for places in (True, False)
    )
    assert official.kept.tolist() == expected["places"].tolist()
    torch.testing.assert_close(official.apply(rows), expected["rows"], **CLOSE)
    # without the official places: the same basis rows, alone and at their own places, and no token is lost
    entries = official.matrix() * (torch.arange(576) != official.kept[:, None])
    basis = entries[(official.matrix() > 0).sum(-1) == 1].sum(0).nonzero().flatten()
    assert len(basis) == h["basis"]
    alone = ours.kept[(ours.counts == 1)]
    assert bool(torch.isin(basis, alone).all())
    assert int(ours.counts.sum()) == 576


@cases("apet_llm")
def test_apet_llm(name):
    _, expected, h = load("apet_llm", name)
    rows = clustered(h["seed"], h["tokens"], h["width"], h["clusters"])
    spec = f"apet-llm(keep={h['keep']}, basis={h['basis']}, official_places=True)"
    torch.testing.assert_close(one(spec)(DecoderTokens(rows[None]))[0].apply(rows), expected["rows"], **CLOSE)


@cases("vscan")
def test_vscan(name):
    _, expected, h = load("vscan", name)
    rows = torch.stack([clustered(h["seed"] + 2 + 3 * i, 576, h["width"], h["clusters"]) for i in range(h["batch"])])
    attention = {5: received(h["seed"], h["batch"]) / 576, 22: received(h["seed"] + 1, h["batch"]) / 576}
    image = ConnectorTokens(rows, cls_attention=ByLayer(attention, 24), grid=(24, 24))
    decision = one("vscan", keep=h["keep"])(image)
    assert torch.equal(kept_mask(decision), expected["kept"])
    torch.testing.assert_close(decision.apply(rows), expected["rows"], **CLOSE)


@cases("prunesid")
def test_prunesid(name):
    _, expected, h = load("prunesid", name)
    attention = ByLayer({22: make_prunesid.attention_of(h)}, depth=24)
    rows = make_prunesid.rows_of(h)
    decision = one(f"prunesid(keep={h['keep']})")(ConnectorTokens(rows, patches=rows, cls_attention=attention))
    assert decision.kept.tolist() == expected["kept"].tolist()


@cases("idpruner")
def test_idpruner(name):
    _, expected, h = load("idpruner", name)
    rows, scorer, keep = make_idpruner.rows_of(h)[None], h.get("scorer"), int(expected["kept"].sum())
    weights = "random" if scorer else "none"
    method = one("idpruner", keep=keep, balance=h.get("balance", 0.5), weights=weights)
    image = ConnectorTokens(rows, cls_attention=ByLayer({22: make_idpruner.scores_of(h)}, depth=24))
    if scorer:
        net = method.make_net(ModelShape("any", make_idpruner.WIDTH, 1), width=make_idpruner.HIDDEN).eval()
        net.load_state_dict(make_idpruner.scorer_of(h))
        image = ConnectorTokens(rows, net=net)
    assert torch.equal(kept_mask(method(image)), expected["kept"])
