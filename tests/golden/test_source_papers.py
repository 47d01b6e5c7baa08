"""VTC-CLS, FasterVLM and DivPrune against inputs and outputs of their authors' code."""

import torch

import tokensieve
from tests.golden.drawn import bells, fill
from tests.golden.small_llava import llava_around
from tests.golden.vectors import CLOSE, cases, load
from tests.support.families import BOS, IMAGE
from tokensieve.methods.divprune import DivPrune
from tokensieve.methods.fastervlm import FasterVlm
from tokensieve.methods.vtc_cls import VtcCls
from tokensieve.ops import max_min
from tokensieve.tokens import ByLayer, ConnectorTokens


def recorded(model, state):
    """Load the recorded CLIP encoder into a LLaVA model."""
    state = {k.removeprefix("sd.vision_model."): v for k, v in state.items() if k.startswith("sd.")}
    state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    missing, unexpected = model.model.vision_tower.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [k for k in missing if "position_ids" not in k]
    return model


def enters_the_llm(model, pixels, tokens, **parameters):
    """Attach ``vtc-cls`` as a user does; return its decision, and the visual rows that enter the LLM."""
    entered = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"][0, 1:-1]), with_kwargs=True
    )
    ids = torch.tensor([[BOS, *[IMAGE] * tokens, 7]])
    with tokensieve.attach(model, "vtc-cls", **parameters) as sieve:
        model(input_ids=ids, pixel_values=pixels)
    ((reduction,),) = sieve.last
    return reduction, entered[0]


@cases("vtc_cls")
@torch.no_grad()
def test_vtc_cls_end_to_end(name):
    """The rows that enter the LLM are those that the authors keep."""
    given, expected, hyper = load("vtc_cls", name)
    model = recorded(llava_around(hyper["config"]), given)
    parameters = {"keep": hyper["token_num"], "first_layer": hyper["start_layer"]}
    reduction, rows = enters_the_llm(model, given["pixel_values"], len(expected["score"]), **parameters)
    assert reduction.kept.tolist() == expected["kept_indices"].tolist()
    torch.testing.assert_close(reduction.scores, expected["score"], **CLOSE)
    torch.testing.assert_close(rows, expected["kept_features"][0], **CLOSE)


@cases("vtc_cls_model_published")
@torch.no_grad()
def test_vtc_cls_end_to_end_on_576_patches(name):
    _, expected, h = load("vtc_cls_model_published", name)
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2}
    model = llava_around({**config, "image_size": 48, "patch_size": 2})
    fill(model.model.vision_tower, h["seed"], h["sharp"])
    pixels = bells(h["seed"] + 1, 1, 3, 48, 48)
    reduction, rows = enters_the_llm(model, pixels, h["tokens"], keep=h["keep"], first_layer=h["first_layer"])
    assert reduction.kept.tolist() == expected["kept_indices"].tolist()
    torch.testing.assert_close(reduction.scores, expected["score"], **CLOSE)
    assert rows.shape == (h["keep"], 16)


@cases("vtc_cls")
def test_vtc_cls_from_rows(name):
    """The method alone, on the recorded attention rows."""
    _, expected, hyper = load("vtc_cls", name)
    rows = expected["cls_rows"]
    tokens = ConnectorTokens(expected["features"], cls_attention=ByLayer(dict(enumerate(rows[:, None]))))
    reduction = VtcCls(keep=hyper["token_num"], first_layer=hyper["start_layer"])(tokens)[0]
    assert reduction.kept.tolist() == expected["kept_indices"].tolist()
    torch.testing.assert_close(reduction.scores, expected["score"], **CLOSE)
    torch.testing.assert_close(reduction.apply(expected["features"][0]), expected["kept_features"][0], **CLOSE)


@cases("fastervlm")
def test_fastervlm(name):
    given, expected, hyper = load("fastervlm", name)
    rows = given["cls_attention"].mean(1)
    tokens = ConnectorTokens(given["features"], cls_attention=ByLayer({3: rows}, 5))
    reduction = FasterVlm(keep=hyper["keep"])(tokens)
    assert reduction.kept.tolist() == expected["kept_indices"].tolist()
    torch.testing.assert_close(reduction.apply(given["features"]), expected["kept_features"], **CLOSE)


@cases("divprune")
def test_divprune(name):
    given, expected, hyper = load("divprune", name)
    tokens = ConnectorTokens(given["features"][None])
    reduction = DivPrune(keep=hyper["ratio"])(tokens)[0]
    assert reduction.kept.tolist() == expected["kept_indices"].tolist()
    order = max_min(given["features"], len(expected["selection_order"]))
    assert order.tolist() == expected["selection_order"].tolist()
