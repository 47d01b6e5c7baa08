"""Every connector method against what its authors' code made of the same inputs."""

import pytest
import torch

from tests.golden.vectors import CLOSE, cases, load
from tokensieve import parse
from tokensieve.methods import cdpruner, mmtok
from tokensieve.methods.hired import Hired
from tokensieve.ops import attention_from_cls_single_head, coverage, dpp_map, max_min, normalise
from tokensieve.tokens import ByLayer, ConnectorTokens, Tiles, UserText


def one(spec, **parameters):
    (method,) = parse(spec, **parameters)
    return method


def close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)


def user_text(rows):
    return UserText(rows, torch.ones(rows.shape[:2], dtype=torch.bool))


def kept(reduction):
    return [row.kept.tolist() for row in reduction]


# -- VisionZip -------------------------------------------------------------------------------------------------------


@cases("visionzip")
def test_visionzip(name):
    x, y, h = load("visionzip", name)
    dominant, few = h["dominant_num"], h["contextual_num"]
    states, metric = x["hidden_states"][:, 1:], x["metric"][:, 1:]
    image = ConnectorTokens(
        states,
        cls_attention=ByLayer({0: x["attention"][:, :, 0, 1:].mean(1)}, 2),
        encoder_keys=ByLayer({0: metric[:, :, None]}, 2),
        patches=states,
    )
    reduction = one("visionzip", keep=dominant + few, contextual=few / (dominant + few))(image)
    out = reduction.apply(states)
    patches = y["dominant_indices"].sort(-1).values[:, 1:] - 1  # the official code passes on [CLS] as well
    for i, single in enumerate(reduction):
        is_dominant = torch.isin(single.kept, patches[i])
        assert single.kept[is_dominant].tolist() == patches[i].tolist()
        close(out[i][is_dominant], y["output"][i, 1 : dominant + 1])
        close(out[i][~is_dominant], y["output"][i, dominant + 1 :])  # contextual ones, in order
        close(single.weight_sums[~is_dominant], 1.0 + (single.counts[~is_dominant] > 1).float())


def test_visionzip_as_in_the_paper_averages_the_group():
    x, _, _ = load("visionzip", "c0")
    states = x["hidden_states"][:, 1:]
    image = ConnectorTokens(
        states,
        cls_attention=ByLayer({0: x["attention"][:, :, 0, 1:].mean(1)}, 2),
        encoder_keys=ByLayer({0: x["metric"][:, 1:, None]}, 2),
    )
    added, group = (one("visionzip", keep=14, contextual=4 / 14, combine=c)(image) for c in ("add", "mean"))
    assert torch.equal(added.matrix() != 0, group.matrix() != 0)
    close(group.weight_sums, torch.ones(1, 14))


# -- PruMerge --------------------------------------------------------------------------------------------------------


def prumerge_image(x):
    features = x["features"]
    attention = attention_from_cls_single_head(x["q"][:, None], x["k"][:, None], 1.0)[:, 1:]
    return ConnectorTokens(
        features,
        cls_attention_single_head=ByLayer({0: attention}),
        encoder_keys=ByLayer({0: x["k"][:, 1:, None]}),
        patches=features,
    )


def same_merges(reduction, features, y):
    """Kept tokens by index, and the extra one, which the official code puts last."""
    indices, rows = y["kept_indices"][0], y["output"][0]
    (single,) = reduction
    out, extra = single.apply(features[0]), ~torch.isin(single.kept, indices)
    assert single.kept[~extra].tolist() == indices.sort().values.tolist()
    close(out[~extra], rows[:-1][indices.argsort()])
    close(out[extra], rows[-1:])


@pytest.mark.parametrize("name", ["c0_base_adaptive", "c1_base_fixed", "c2_plus_adaptive", "c4_base_adaptive"])
def test_prumerge(name):
    x, y, h = load("prumerge", name)
    image = prumerge_image(x)
    close(image.cls_attention_single_head[0], y["cls_attn"])
    spec = "prumerge+" if h["plus"] else "prumerge"
    keep = None if h["if_adaptive"] else int(image.total * h["reduction_ratio"]) + 1
    same_merges(one(spec, keep=keep)(image), x["features"], y)


@cases("prumerge_plus_fixed")
def test_prumerge_plus_of_vtc_cls(name):
    x, y, h = load("prumerge_plus_fixed", name)
    top, stride = {64: (13, 11), 128: (40, 6)}.get(h["token_num"], (95, 3))
    same_merges(one("prumerge+", top=top, stride=stride)(prumerge_image(x)), x["features"], y)


def test_prumerge_plus_fixed_without_the_duplicates_of_the_official_code():
    x, y, _ = load("prumerge", "c3_plus_fixed")
    image, twice = prumerge_image(x), y["kept_indices"][0]
    (single,) = one("prumerge+", top=72, stride=8, offset=4)(image)
    indices = twice.unique()
    assert 0 < len(twice) - len(indices) < 72, "this case has duplicates"
    extra = ~torch.isin(single.kept, indices)
    assert single.kept[~extra].tolist() == indices.tolist()
    assert extra.sum() == 1


# -- VisPruner, HiRED ------------------------------------------------------------------------------------------------


@cases("vispruner")
def test_vispruner(name):
    x, y, h = load("vispruner", name)
    image = ConnectorTokens(
        x["features"], cls_attention=ByLayer({0: x["cls_attention"].mean(1)}, 2), patches=x["features"]
    )
    reduction = one("vispruner", keep=h["keep"], important=h["important_ratio"])(image)
    assert kept(reduction) == y["kept_indices"].tolist()


@cases("hired_llava15")
def test_hired(name):
    x, y, h = load("hired_llava15", name)
    rows = x["attention"][:, :, 0, 1:].mean(1)
    image = ConnectorTokens(rows[..., None], cls_attention=ByLayer({0: rows}, 2))
    keep = int(h["num_vision_tokens"] * h["budget_rate"])
    assert kept(one("hired", keep=keep)(image)) == [y["kept_indices"].tolist()]
    if h["spatial_tokens"]:
        with_spatial = one("hired", keep=keep, spatial=h["spatial_tokens"])(image)
        assert kept(with_spatial) == [y["kept_with_spatial"].tolist()]


@cases("hired_llavanext")
def test_hired_tiles(name):
    x, y, h = load("hired_llavanext", name)
    size, first = h["num_vision_tokens"], 0
    for crops in h["num_patches"]:
        rows = [x[layer][first : first + crops].mean(1).flatten() for layer in ("cls_layer0", "cls_layer22")]
        high, wide = (6, 6) if size == 36 else (1, size)
        rows_of_tiles, in_a_row = {3: (1, 2), 5: (2, 2)}[crops]  # the flat count does not ask how tiles lie
        image = ConnectorTokens(
            rows[0][None, :, None],
            cls_attention=ByLayer({0: rows[0][None], 22: rows[1][None]}, 24),
            tiles=Tiles(
                torch.arange(crops).repeat_interleave(size)[None],
                crops - 1,
                ((high, wide), (rows_of_tiles * high, in_a_row * wide)),
            ),
        )
        keep = int(crops * size * h["budget_rate"])
        (single,) = Hired(keep=keep, alpha=h["alpha"], official_tiles=True)(image)
        mask = y["keep_mask"][first : first + crops].flatten()
        assert single.kept.tolist() == mask.nonzero().flatten().tolist()
        if size == 36:
            (full,) = Hired(keep=keep, alpha=h["alpha"])(image)
            assert full.slots == keep
        first += crops


# -- greedy methods --------------------------------------------------------------------------------------------------


@cases("cdpruner")
def test_cdpruner(name, monkeypatch):
    """With the official relevance: CLIP's joint space, where the cosine is negated. No model here has it."""
    x, y, h = load("cdpruner", name)
    texts = normalise(x["text_embeds"].expand(len(x["features"]), -1, -1))
    relevance = -(normalise(x["image_embeds"]) @ texts.transpose(-1, -2)).mean(-1)
    monkeypatch.setattr(cdpruner, "text_similarity", lambda *args: relevance)
    image = ConnectorTokens(x["features"], user_text=user_text(texts))
    assert kept(one("cdpruner", keep=h["keep"], over_batch=True)(image)) == y["kept_indices"].tolist()


@cases("scope")
def test_scope(name):
    x, y, h = load("scope", name)
    image = ConnectorTokens(x["features"], cls_attention=ByLayer({0: x["cls_attention"]}, 2), patches=x["features"])
    combine = {"multi": "times", "add": "plus"}[h["combined"]]
    reduction = one("scope", keep=h["keep"], alpha=h["alpha"], combine=combine)(image)
    assert kept(reduction) == y["kept_indices"].sort(-1).values.tolist()


@cases("mmtok")
def test_mmtok(name, monkeypatch):
    """The official code knows which patches show padding of the picture, and does not choose these."""
    x, y, h = load("mmtok", name)
    padding = torch.zeros(1, len(x["features"]), dtype=torch.bool)
    padding[:, h["padding_patch_indices"] or []] = True
    monkeypatch.setattr(mmtok, "coverage", lambda *args: coverage(*args, (~padding).float()))
    image = ConnectorTokens(
        x["features"][None], patches=x["clip_features"][None], user_text=user_text(x["text_embeds"][None])
    )
    method = one(
        "mmtok",
        keep=h["keep"],
        balance=h["alpha"],
        text_temperature=h["tv_temp"],
        image_temperature=h["vv_temp"],
    )
    assert kept(method(image)) == [y["kept_indices"].tolist()]


# -- HoloV -----------------------------------------------------------------------------------------------------------


@cases("holov")
def test_holov(name):
    x, y, h = load("holov", name)
    image = ConnectorTokens(x["features"], cls_attention=ByLayer({0: x["attention"]}, 2))
    reduction = one("holov", keep=h["keep"], windows=h["num_patches"], overflow="truncate")(image)
    official = [row[row >= 0].sort().values for row in y["output_indices"]]  # −1: a row of zeros
    assert kept(reduction) == [row.tolist() for row in official]
    whole = one("holov", keep=h["keep"], windows=h["num_patches"])(image)
    for ours, row in zip(whole, official, strict=True):
        assert ours.slots == h["keep"]  # no share is lost
        assert len(row) < h["keep"] or ours.kept.tolist() == row.tolist()


def test_greedy_selections_agree_with_their_definitions():
    rows = torch.randn(2, 60, 24)
    quality = torch.rand(2, 60) + 0.1
    kernel = quality[:, :, None] * (normalise(rows) @ normalise(rows).mT) * quality[:, None]
    order = dpp_map(rows, quality, 8)
    for i in range(2):
        chosen: list[int] = []
        for index in order[i].tolist():
            gains = [
                -torch.inf if j in chosen else kernel[i].double()[[*chosen, j]][:, [*chosen, j]].logdet()
                for j in range(60)
            ]
            assert index == int(torch.tensor(gains).argmax())
            chosen.append(index)
    distance = 1 - normalise(rows) @ normalise(rows).mT
    order = max_min(rows, 6)
    for i in range(2):
        for step in range(1, 6):
            nearest = distance[i][:, order[i, :step]].amin(-1)
            nearest[order[i, :step]] = -1
            assert int(nearest.argmax()) == int(order[i, step])
