"""The methods inside the vision tower against what their authors' code made of the same inputs."""

import torch

import tokensieve
from tests.golden import make_flowcut
from tests.golden.vectors import CLOSE, cases, load
from tests.support.families import BOS, IMAGE
from tokensieve import parse
from tokensieve.budget import ramp
from tokensieve.tokens import DecoderTokens, EncoderTokens


def method(spec):
    return parse(spec)[0]


def tome(x, metric, size, specials, r, order=True):
    """One merge as the tower does it: the decision, the rows it leaves and the patches that each stands for."""
    image = EncoderTokens(
        x[:, specials:],
        encoder_keys=metric[:, specials:, None],
        sizes=None if size is None else size[:, specials:, 0],
        specials=specials,
    )
    decision = method(f"tome(r={r}, official_order={order})")(image)
    before = torch.ones(x.shape[:2])[:, specials:] if size is None else size[:, specials:, 0]
    sizes = (decision.matrix() != 0).float() @ before[..., None]
    return decision, torch.cat([x[:, :specials], decision.apply(image.features)], 1), sizes


def membership(decision):
    return (decision.matrix() != 0).float()


@cases("tome")
def test_tome(name):
    given, expected, hp = load("tome", name)
    specials = hp["class_token"] + hp["distill_token"]
    x, size = given["x"], given.get("size")
    decision, merged, sizes = tome(x, given["metric"], size, specials, hp["r"])
    patches = slice(specials, None)
    if hp["distill_token"]:  # the official code puts the second special token behind the first; so do we
        assert torch.equal(expected["source"][:, :2, :2], torch.eye(2).expand(len(x), -1, -1))
    assert torch.equal(membership(decision), expected["source"][:, patches, patches])
    torch.testing.assert_close(merged, expected["merged"], **CLOSE)
    torch.testing.assert_close(sizes, expected["merged_size"][:, patches], **CLOSE)

    raster, *_ = tome(x, given["metric"], size, specials, hp["r"], order=False)
    order = decision.anchors.argsort(-1)
    assert torch.equal(raster.anchors, decision.anchors.sort(-1).values)
    torch.testing.assert_close(raster.matrix(), decision.matrix().take_along_dim(order[..., None], 1))

    if hp["r2"]:  # the second merge finds the tokens in the order that the first one left
        full = torch.cat([expected["merged_size"][:, :specials], sizes], 1)
        second, again, _ = tome(merged, merged[..., : hp["D2"]], full, specials, hp["r2"])
        torch.testing.assert_close(again, expected["second_merged"], **CLOSE)
        both = membership(second) @ membership(decision)
        assert torch.equal(both, expected["second_source"][:, patches, patches])


@cases("tome")
def test_tome_schedule(name):
    _, expected, hp = load("tome", name)
    r, inflection = hp["r_schedule"]
    stages = hp["layers"]
    assert [int(n) for n in ramp(r, int(r * (1 - inflection)), stages)] == expected["parse_r"].tolist()
    left = method(f"tome(r={r}, inflection={inflection})").stage_budgets(10**6, range(stages), stages)
    assert torch.tensor([10**6, *left]).diff().neg().tolist() == expected["parse_r"].tolist()


@cases("illava_encoder")
def test_illava(name):
    given, expected, hp = load("illava_encoder", name)
    hidden, r = given["hidden"], hp["reduce"]
    received = given["attention"].mean((1, 2))
    image = EncoderTokens(hidden, attention_received=received)
    decision = method(f"illava-encoder(keep={hidden.shape[1] - r})")(image)
    assert torch.equal(decision.kept, expected["kept_indices"])
    torch.testing.assert_close(decision.apply(hidden), expected["output"], **CLOSE)
    for one, sources, scores in zip(decision, expected["merged_source"], received, strict=True):
        (slot,) = (one.counts > 1).nonzero().flatten().tolist()
        assert (one.source == slot).nonzero().flatten().tolist() == sources.sort().values.tolist()
        assert one.matrix()[slot].argmax() == scores.argmin(), "the least attended weighs most, as in the official code"


@cases("mustdrop_encoder")
def test_mustdrop(name):
    given, expected, hp = load("mustdrop_encoder", name)
    hidden = given["hidden"]
    side = hp["grid"]
    image = EncoderTokens(hidden[:, 1:], grid=(side, side))
    spec = f"mustdrop-encoder(threshold={hp['threshold']}, window={hp['window'][0]}"
    decision = method(f"{spec}, over_batch=True)")(image)
    for i, one in enumerate(decision):
        members = {tuple(row.nonzero().flatten().tolist()): slot for slot, row in enumerate(one.matrix())}
        official = [tuple(row.nonzero().flatten().tolist()) for row in expected["source"][i, 1:, 1:]]
        order = [members[row] for row in official]
        assert sorted(order) == list(range(one.slots))
        torch.testing.assert_close(one.apply(hidden[i, 1:])[order], expected["merged"][i, 1:], **CLOSE)
        torch.testing.assert_close(one.counts[order].float(), expected["size"][i, 1:, 0])
    alone = [method(f"{spec})")(EncoderTokens(rows[None, 1:], grid=(side, side)))[0].slots for rows in hidden]
    assert max(alone) == expected["merged"].shape[1] - 1, "in a batch of the official code the others merge less"
    assert [one.slots for one in method(f"{spec})")(image)] == alone


@cases("mustdrop_llm")
def test_mustdrop_llm(name):
    given, expected, hp = load("mustdrop_llm", name)
    start, n = hp["image_start"], hp["image_tokens"]
    ranked = torch.zeros(1, n)
    ranked[0, given["key_set"]] = 1.0
    image = DecoderTokens(
        torch.zeros(1, n, 1),
        attention=given["attention"][:, :, start + n :, start : start + n],
        connector_scores=ranked,
    )
    spec = f"mustdrop-llm(layers=(1,), together={hp['global_thr'] * n}, single={hp['individual_thr'] * n}"
    (decision,) = method(f"{spec}, protect={(len(given['key_set']) - 0.5) / n})")(image)
    assert decision.kept.tolist() == expected["kept_indices"].tolist()
    assert torch.isin(expected["new_key_set"], decision.source[given["key_set"]]).all()
    (decision,) = method(f"{spec}, protect=0)")(image)
    assert decision.kept.tolist() == expected["passing_indices"].tolist()
    assert decision.notes == ()


@cases("flowcut")
@torch.no_grad()
def test_flowcut_attached(name):
    _, expected, h = load("flowcut", name)
    model, pixels = make_flowcut.small_llava(h)
    entered, numbers = [], []
    layers = model.model.vision_tower.encoder.layers
    ids = torch.tensor([[BOS, *[IMAGE] * 576, 7]])
    with tokensieve.attach(model, f"flowcut(keep={h['keep']})") as sieve:
        for layer in layers:  # after the hooks that shorten the rows
            layer.register_forward_hook(lambda layer, args, rows: numbers.append(rows.shape[1] - 1))
        model.model.language_model.register_forward_pre_hook(
            lambda llm, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(input_ids=ids, pixel_values=pixels)
    assert numbers == expected["numbers"].tolist()
    assert sieve.last[0][0].kept.tolist() == expected["kept"].tolist()
    torch.testing.assert_close(entered[0][0, 1:-1], expected["rows"], atol=1e-4, rtol=1e-4)
