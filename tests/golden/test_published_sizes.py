"""The authors' code at published sizes, with ties, batches, halves and hidden keys; departures are listed by case.

Inputs are drawn (``drawn.py``) as the manifest tells, outputs are those of the authors' code. A case that is listed as
a departure must differ from their result, and its reason stands on the method's page.
"""

import torch
from torch import Tensor
from torch.testing import assert_close

from tests.golden.drawn import attention_rows, bells, positive, rows_with_copies, weights, words_mask
from tests.golden.pumer_hosts import meter_layer, official, own_key_visible, vilt_block
from tests.golden.vectors import CLOSE, cases, entries, load
from tokensieve import parse
from tokensieve.crossmodal import Merge
from tokensieve.methods import cdpruner
from tokensieve.methods.raters import raters
from tokensieve.ops import max_min, normalise
from tokensieve.tokens import ByLayer, ConnectorTokens, DecoderTokens, DecoderUserText, UserText

# {case: why the authors' code keeps other tokens, or fails}
VTC_CLS = {
    "ties": "equal scores: their choice is not defined",
    "bfloat16": "averages heads and adds layers in bfloat16",
    "keep_1": "fails",
    "tokens_1": "fails",
    "tokens_729": "fails above 576 patches",
    "tokens_2880": "fails above 576 patches",
    "batch_3": "is written for one image",
}
FASTV = {"ties": "equal scores: their choice is not defined", "bfloat16": "averages heads in bfloat16"}
DIVPRUNE = {
    "float16": "computes distances in float16",
    "bfloat16": "computes distances in bfloat16",
    "copies": "selects tokens twice",
    "a_zero_row": "selects a token twice",
    "tokens_1": "fails",
}
CDPRUNER = {"more_than_the_rank": "selects tokens twice", "same_relevance": "selects tokens twice"}
SPARSEVLM = {"keep_all": "keeps all but one token and merges that one"}


def method(name: str, **parameters):
    (found,) = parse(name, **parameters)
    return found


def kept(reduction) -> list[list[int]]:
    return [row.kept.tolist() for row in reduction]


def best(scores: Tensor, keep: int) -> list[int]:
    """Return the ``keep`` largest of `[N]`, ascending; of equals the first."""
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:keep])


def departs(name: str, departures: dict[str, str], ours: list, theirs: list) -> bool:
    """Return whether a case is a departure; then the authors' result must differ, or the list is out of date."""
    assert name not in departures or ours != theirs, f"{name} agrees: take it off the list, and off the method's page"
    return name in departures


@cases("vtc_cls_published")
def test_vtc_cls(name):
    _, expected, h = load("vtc_cls_published", name)
    batch, total = h.get("batch", 1), h["tokens"]
    precision = getattr(torch, h.get("dtype", "float32"))
    rows = [attention_rows(h["seed"] + layer, batch, 4, total, h.get("levels", 0)) for layer in range(6)]
    rows = [row.to(precision).float() for row in rows]  # evidence is float32, from whatever the model computes
    image = ConnectorTokens(
        torch.zeros(batch, total, 1), cls_attention=ByLayer({i: r.mean(1) for i, r in enumerate(rows)})
    )
    reduction = method("vtc-cls", keep=h["keep"], first_layer=h["first_layer"])(image)
    theirs = [row.tolist() for row in expected.get("kept_indices", torch.empty(0, 0))[None]]
    if not departs(name, VTC_CLS, kept(reduction), theirs):
        assert kept(reduction) == theirs
        return
    scores = torch.stack([row.mean(1) for row in rows[h["first_layer"] : -1]]).sum(0)
    assert kept(reduction) == [best(row, h["keep"]) for row in scores]
    if name == "ties":  # the same scores stay
        assert scores[0, theirs[0]].sort().values.tolist() == scores[0, kept(reduction)[0]].sort().values.tolist()


@cases("fastv_published")
def test_fastv(name):
    _, expected, h = load("fastv_published", name)
    rows = attention_rows(h["seed"], h.get("batch", 1), 4, h["tokens"], h.get("levels", 0))
    rows = rows.to(getattr(torch, h.get("dtype", "float32")))
    image = DecoderTokens(torch.zeros(len(rows), h["tokens"], 1), attention=rows[:, :, None].float())
    ours, theirs = kept(method("fastv", keep=h["keep"])(image)), expected["kept_indices"].tolist()
    scores = rows.float().mean(1)
    assert ours == [best(row, h["keep"]) for row in scores]
    if departs(name, FASTV, ours, [theirs]):
        worst = float(scores[0].sort(descending=True).values[h["keep"] - 1])
        others = set(theirs) ^ set(ours[0])  # all of them are near the last score that stays
        assert all(abs(float(scores[0, token]) - worst) < 2**-7 * worst for token in others)
        return
    assert ours[0] == theirs
    # in a batch, theirs applies the choice of the first sample to all
    assert len(ours) == 1 or theirs not in ours[1:]


@cases("visionzip_published")
def test_visionzip(name):
    _, expected, h = load("visionzip_published", name)
    batch, total, keep = h.get("batch", 1), h["tokens"], h["dominant"] + h["contextual"]
    rows = attention_rows(h["seed"], batch, 4, total)
    hidden, metric = (bells(h["seed"] + 1 + i, batch, total + 1, w)[:, 1:] for i, w in enumerate((4, 8)))
    image = ConnectorTokens(
        hidden,
        cls_attention=ByLayer({0: rows.mean(1)}, 2),
        encoder_keys=ByLayer({0: metric[:, :, None]}, 2),
        patches=hidden,
    )
    reduction = method("visionzip", keep=keep, contextual=h["contextual"] / keep)(image)
    out = reduction.apply(hidden)
    for i, single in enumerate(reduction):
        is_dominant = torch.isin(single.kept, expected["dominant_indices"][i])
        assert single.kept[is_dominant].tolist() == expected["dominant_indices"][i].tolist()
        assert_close(out[i][~is_dominant], expected["contextual"][i], **CLOSE)


@cases("divprune_published")
def test_divprune(name):
    _, expected, h = load("divprune_published", name)
    rows = rows_with_copies(h["seed"], h["tokens"], h["width"], h.get("copies", 0), h.get("zeros", 0))
    rows = rows.to(getattr(torch, h.get("dtype", "float32")))
    ours = max_min(rows, h["keep"]).tolist()
    assert kept(method("divprune", keep=h["keep"])(ConnectorTokens(rows[None]))) == [sorted(ours)]
    assert len(set(ours)) == h["keep"]
    theirs = expected.get("selection_order", torch.empty(0)).tolist()
    if departs(name, DIVPRUNE, ours, theirs):
        assert "twice" not in DIVPRUNE[name] or len(set(theirs)) < h["keep"]
        return
    assert ours == theirs


@cases("cdpruner_published")
def test_cdpruner(name, monkeypatch):
    _, expected, h = load("cdpruner_published", name)
    batch, total = h.get("batch", 1), h["tokens"]
    embeddings, text = bells(h["seed"] + 1, batch, total, 8), bells(h["seed"] + 2, 2, 8)
    if h.get("same_relevance"):
        embeddings = embeddings[:, :1].expand(-1, total, -1)
    # the official relevance: CLIP's joint space, where the cosine is negated. No model here has it
    relevance = -(normalise(embeddings) @ normalise(text).mT).mean(-1)
    monkeypatch.setattr(cdpruner, "text_similarity", lambda *args: relevance)
    words = UserText(text.expand(batch, -1, -1), torch.ones(batch, 2, dtype=torch.bool))
    image = ConnectorTokens(bells(h["seed"], batch, total, h["width"]), user_text=words)
    reduction = method("cdpruner", keep=h["keep"], over_batch=True)(image)
    if name in CDPRUNER:
        assert [len(set(row)) for row in kept(reduction)] == [h["keep"]]
        assert int(expected["distinct"]) < h["keep"]
        return
    assert kept(reduction) == expected["kept_indices"].tolist()


@cases("sparsevlm_published")
def test_sparsevlm(name):
    _, expected, h = load("sparsevlm_published", name)
    total, start, count = h["tokens"], 3, 12
    embeddings = bells(h["seed"], 1, start + total + count, 8) / 2
    hidden = bells(h["seed"] + 1, 1, start + total + count, 8)[:, start : start + total]
    words = embeddings[:, start + total :]
    image = DecoderTokens(
        hidden,
        user_text=DecoderUserText(words, torch.ones(1, count, dtype=torch.bool), input_embeddings=words),
        attention=positive(h["seed"] + 2, 1, 4, count, total),
        input_embeddings=embeddings[:, start : start + total],
        budget=h["keep"],
    )
    assert raters(image)[0].nonzero().flatten().tolist() == expected["rater_idx"].tolist()
    decision = method("sparsevlm", keep=h["keep"], appended=True, noise_seed=h["noise_seed"])(image)[0]
    if departs(name, SPARSEVLM, [decision.slots], [len(expected["kept_indices"])]):
        assert decision.whole
        return
    slots, keep = decision.source, len(expected["kept_indices"])
    assert ((slots >= 0) & (slots < keep)).nonzero().flatten().tolist() == expected["kept_indices"].tolist()
    assert (slots >= keep).nonzero().flatten().tolist() == expected["recycled_indices"].tolist()
    out = decision.apply(hidden[0])
    assert torch.equal(out[:keep], hidden[0, expected["kept_indices"].long()])
    assert_close(out[keep:], expected["merged"], **CLOSE)  # in the official order
    assert start + decision.slots == int(expected["text_start"])


@cases("holov_published")
def test_holov(name):
    _, expected, h = load("holov_published", name)
    batch, total = h.get("batch", 1), h["tokens"]
    attention = attention_rows(h["seed"] + 1, batch, 1, total)[:, 0]
    attention = attention * (1 + h.get("peak", 0) * (torch.arange(total) < total // h["windows"]))
    image = ConnectorTokens(bells(h["seed"], batch, total, 8), cls_attention=ByLayer({0: attention}, 2))
    truncated = method("holov", keep=h["keep"], windows=h["windows"], overflow="truncate")(image)
    theirs = [row[row >= 0].sort().values.tolist() for row in expected["output_indices"]]  # −1: a row of zeros
    assert kept(truncated) == theirs
    ours = kept(method("holov", keep=h["keep"], windows=h["windows"])(image))
    assert [len(row) for row in ours] == [h["keep"]] * batch
    assert all(len(row) < h["keep"] or row == mine for row, mine in zip(theirs, ours, strict=True))
    assert ("overflow" in name) == any(len(row) < h["keep"] for row in theirs)


# -- PuMer -----------------------------------------------------------------------------------------------------------

EXACT = {"atol": 5e-6, "rtol": 5e-6}


def shapes(width: int, hidden: int, names: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's weights: ``names`` maps modules to kinds, "wide" is from D to ``hidden``."""
    sizes = {"norm": (width,), "same": (width, width), "wide": (hidden, width), "back": (width, hidden)}
    sizes["three"] = (3 * width, width)
    out = {}
    for module, kind in names.items():
        out[f"{module}.weight"], out[f"{module}.bias"] = sizes[kind], sizes[kind][:1]
    return out


def vilt_weights(h):
    names = {"norm1": "norm", "norm2": "norm", "attn.qkv": "three", "attn.proj": "same"}
    names |= {"mlp.fc1": "wide", "mlp.fc2": "back"}
    return weights(h["seed"], shapes(h["width"], 4 * h["width"], names), h["sharp"])


def meter_weights(h):
    names = {"intermediate.dense": "wide", "output.dense": "back", "output.LayerNorm": "norm"}
    for attention in ("attention", "crossattention"):
        names |= {f"{attention}.self.{part}": "same" for part in ("query", "key", "value")}
        names |= {f"{attention}.output.dense": "same", f"{attention}.output.LayerNorm": "norm"}
    return weights(h["seed"], shapes(h["width"], 2 * h["width"], names), h["sharp"])


@cases("pumer_vilt_published")
def test_pumer_in_vilt(name):
    _, expected, h = load("pumer_vilt_published", name)
    batch, words = len(h["lengths"]), h["words"]
    rows = bells(h["seed"] + 1, batch, words + h["tokens"], h["width"])
    mask = torch.cat([words_mask(words, h["lengths"]), torch.ones(batch, h["tokens"], dtype=torch.long)], 1)
    pumer = official(h["prune"], h["merge"], h["merge_text"], [0])
    out = vilt_block(rows, mask, words, vilt_weights(h), h["heads"], pumer)
    # the authors' own float32 differs by 1.1e-5 from float64 where a hidden key is the strongest
    assert_close(out, expected["rows"], **(CLOSE if name == "hidden_key_strongest" else EXACT))


@cases("pumer_meter_published")
def test_pumer_in_meter(name):
    _, expected, h = load("pumer_meter_published", name)
    batch, width, mask = len(h["lengths"]), h["width"], words_mask(h["words"], h["lengths"])
    text, image = (bells(h["seed"] + 1 + i, batch, n, width) for i, n in enumerate((h["words"], h["tokens"])))
    pumer = official(h["prune"], h["merge"], h["merge_text"], [0])
    text, image, bias = meter_layer(text, image, mask, meter_weights(h), h["heads"], pumer)
    assert_close(text, expected["text"], **EXACT)
    assert_close(image, expected["image"], **EXACT)
    assert_close(bias.exp(), own_key_visible(expected["text_mask"], image.shape[1]), **EXACT)


@cases("pumer_bipartite_published")
def test_pumer_matching(name):
    _, expected, h = load("pumer_bipartite_published", name)
    batch, total = h.get("batch", 1), h["tokens"]
    pairs, every = min(h["merges"], (total - 1) // 2), torch.arange(total).expand(batch, -1)
    merge = Merge.of(every, [total] * batch, bells(h["seed"], batch, total, 8), [pairs] * batch, in_place=False)
    numbers = every[..., None].float()
    if not expected:  # at most two tokens: the authors' code fails, here none merge
        assert torch.equal(merge.apply(numbers), numbers)
        return
    assert_close(merge.apply(numbers)[..., 0], expected["merged"], **CLOSE)
    assert torch.equal(merge.sizes().short(), expected["size"])


def test_the_cases_cover_the_sizes():
    """Every size, budget and kind of input of the list above is in at least one case."""
    published = {name: entry for name, entry in entries().items() if name.endswith("_published")}
    settings = [case["hyperparameters"] for entry in published.values() for case in entry["cases"]]
    assert {1, 45, 576, 729, 2880} <= {h["tokens"] for h in settings}
    assert any(h.get("keep") == 1 for h in settings)
    assert any(h.get("keep") == h["tokens"] for h in settings)
    assert any(h.get("batch") == 3 for h in settings)
    assert {"float16", "bfloat16"} <= {h.get("dtype") for h in settings}
    for departures, of in ((VTC_CLS, "vtc_cls"), (FASTV, "fastv"), (DIVPRUNE, "divprune"), (CDPRUNER, "cdpruner")):
        assert departures.keys() <= {case["case"] for case in published[f"{of}_published"]["cases"]}
