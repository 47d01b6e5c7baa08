"""The contract of methods: evidence belongs to a stage, for the registry and for mypy, and a score is enough."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tokensieve
from tokensieve.methods import DecoderMethod, DecoderNeeds, EncoderMethod, EncoderNeeds, Method, Needs, ScoreMethod
from tokensieve.methods.needs import StageNeeds
from tokensieve.ops import top_k
from tokensieve.reduction import Mixing, Reduction
from tokensieve.tokens import ConnectorTokens, DecoderTokens, EncoderTokens, VisualTokens

BASES = {"connector": Method, "encoder": EncoderMethod, "decoder": DecoderMethod}
SOURCE = Path(tokensieve.__file__).parents[1]
NEEDS = {"connector": Needs, "encoder": EncoderNeeds, "decoder": DecoderNeeds}


@pytest.mark.parametrize("wrong", [Needs, EncoderNeeds, DecoderNeeds, StageNeeds])
@pytest.mark.parametrize("stage", BASES)
def test_the_evidence_of_another_stage_is_refused(registry, stage, wrong):
    own = dataclass(frozen=True)(type("Own", (BASES[stage],), {}))
    decorate = registry.register("own", paper="none", stage=stage, needs=wrong())
    if wrong is NEEDS[stage]:
        assert decorate(own).info.needs == wrong()
        return
    with pytest.raises(TypeError, match=f"has the evidence of {NEEDS[stage].__name__}; got {wrong.__name__}"):
        decorate(own)


@pytest.mark.parametrize(
    ("stage", "base"), [("decoder", Method), ("encoder", DecoderMethod), ("fusion", EncoderMethod)]
)
def test_the_base_of_another_stage_is_refused(registry, stage, base):
    own = dataclass(frozen=True)(type("Own", (base,), {}))
    with pytest.raises(TypeError, match=f"Own must be a dataclass derived from .* to act at stage {stage!r}"):
        registry.register("own", paper="none", stage=stage)(own)


@dataclass(frozen=True)
class Norms(ScoreMethod):
    keep: int | float = 3

    def score(self, image):
        return image.features.norm(dim=-1)


@dataclass(frozen=True)
class InnerNorms(Norms, DecoderMethod):
    layer: int | float = 0.5


@pytest.mark.parametrize(
    ("cls", "stage", "tokens"), [(Norms, "connector", ConnectorTokens), (InnerNorms, "decoder", DecoderTokens)]
)
def test_a_score_gives_reduce_and_by_score(registry, cls, stage, tokens):
    method, image = registry.register("norms", paper="none", stage=stage)(cls)(), tokens(torch.randn(2, 9, 4))
    reduction = method(image)
    assert method.by_score
    assert torch.equal(reduction.scores, image.features.norm(dim=-1))
    assert torch.equal(reduction.kept, top_k(reduction.scores, 3).sort().values)
    assert method(replace(image, budget=5)).slots == 5, "the engine's number comes before the parameter"
    assert method(replace(image, budget=9)).whole
    if stage == "decoder":
        assert method.layer_numbers(6) == [3]
        assert method.stage_budgets(9, [3], 6) == [3]


SNIPPET = """
from dataclasses import dataclass
from torch import Tensor
from tokensieve.methods import {needs}, ScoreMethod, register
from tokensieve.tokens import ConnectorTokens, given

@register("mine", paper="none", needs={needs}())
@dataclass(frozen=True)
class Mine(ScoreMethod):
    def score(self, image: ConnectorTokens) -> Tensor:
        return given(image.{evidence})
"""
SNIPPETS = {
    "right": SNIPPET.format(needs="Needs", evidence="patches"),
    "evidence": SNIPPET.format(needs="Needs", evidence="attention"),
    "needs": SNIPPET.format(needs="DecoderNeeds", evidence="patches"),
}


@pytest.mark.slow
def test_mypy_knows_the_evidence_of_each_stage(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    for name, text in SNIPPETS.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("MYPYPATH", str(SOURCE))
    options = ["--strict", "--follow-imports", "silent", "--cache-dir", str(tmp_path / "cache")]
    output, errors, status = api.run([*options, *(str(tmp_path / f"{name}.py") for name in SNIPPETS)])
    assert (status, errors) == (1, ""), output
    assert "right.py" not in output
    assert 'evidence.py:11: error: "ConnectorTokens" has no attribute "attention"' in output
    assert 'needs.py:7: error: No overload variant of "register" matches' in output


def wrong_decisions(image):
    """Return {message: what a method returns by mistake} for 2 images of 9 tokens."""
    pair = torch.tensor([[1, 2], [1, 2]])
    mixing = Mixing(torch.full_like(pair, 5), pair, torch.ones(2, 2))
    return {
        "must return a Reduction; got NoneType": None,
        "must return a Reduction; got Tensor": pair,
        "must return a Reduction; got list": [Reduction(9, pair[0])] * 2,
        "anchors must be distinct": image.keep(torch.ones_like(pair)),
        "anchors must ascend": Reduction(9, pair.flip(-1)),
        "anchors must be from 0 to 8; got -2 to -1": image.keep(-pair),
        "anchors must be from 0 to 8; got 8 to 9": image.keep(pair + 7),
        "anchors must be int64, [E] or [B, E]; got torch.bool, [2, 9]": image.keep(image.features[..., 0] > 0),
        "anchors must be int64, [E] or [B, E]; got torch.float32, [2, 2]": image.keep(pair.float()),
        "anchors must be [2, K] of 9 tokens; got [1, 2] of 9": image.keep(pair[:1]),
        "anchors must be [2, K] of 9 tokens; got [2] of 9": Reduction(9, pair[0]),
        "anchors must be [2, K] of 9 tokens; got [2, 2] of 12": Reduction(12, pair),
        "anchors must be on cpu; got meta": image.keep(pair.to("meta")),
        "slot must be from 0 to 1; got 5 to 5": Reduction(9, pair, mixing),
        "scores must have shape [2, 9]; got [9]": image.keep(pair, torch.ones(9)),
    }


@pytest.mark.parametrize("message", wrong_decisions(VisualTokens(torch.zeros(2, 9, 4))))
@pytest.mark.parametrize(
    ("stage", "tokens"), [("connector", ConnectorTokens), ("encoder", EncoderTokens), ("decoder", DecoderTokens)]
)
def test_what_a_method_returns_by_mistake_is_named(registry, stage, tokens, message):
    """A bug of a plug-in must neither reach the model's tensors nor read as if the model were at fault."""
    if stage == "encoder" and message == "anchors must ascend":
        pytest.skip("a vision encoder's layers may receive their rows in any order")
    image = tokens(torch.randn(2, 9, 4))
    mistake = {"keep": 3, "reduce": lambda self, image: wrong_decisions(image)[message]}
    annotations = {"__annotations__": {"keep": int}}
    cls = dataclass(frozen=True)(type("Mistaken", (BASES[stage],), annotations | mistake))
    method = registry.register("mistaken", paper="none", stage=stage)(cls)()
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as caught:
        method(image)
    assert "reduce() of mistaken" in str(caught.value)
    assert not isinstance(caught.value, tokensieve.Refusal), "it is a bug, and keeps its traceback"


def test_a_method_may_drop_every_token(registry):
    nothing = torch.empty(2, 0, dtype=torch.int64)
    assert VisualTokens(torch.zeros(2, 9, 4)).keep(nothing).fault() is None
    assert VisualTokens(torch.zeros(2, 9, 4)).keep(nothing, counts=torch.zeros(2, dtype=torch.int64)).slots == 0


@pytest.mark.parametrize("counts", [[0, 0], [0, 3], [3, 0]])
def test_an_image_may_keep_nothing(counts):
    rows = torch.randn(2, 9, 4)
    indices = torch.tensor([[7, 2, 5, 1], [8, 3, 0, 4]])
    decision = VisualTokens(rows).keep(indices, torch.rand(2, 9), counts=torch.tensor(counts))
    assert decision.fault() is None
    assert decision.anchors.shape == (2, max(counts))
    for image, (reduction, count) in enumerate(zip(decision, counts, strict=True)):
        kept = sorted(indices[image, :count].tolist())
        assert reduction.kept.tolist() == kept
        assert reduction.counts.tolist() == [1] * count
        assert torch.equal(reduction.apply(rows[image]), rows[image, kept])
        assert (reduction.source >= 0).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("number", [np.int64(5), np.int8(5), np.uint16(5), np.float32(0.5), np.float64(0.5)])
def test_numbers_of_numpy_are_numbers(number):
    (method,) = tokensieve.parse("uniform", keep=number)
    assert type(method.keep) in (int, float)
    assert method.keep == number
    assert tokensieve.parse(str(method)) == [method]
    (layered,) = tokensieve.parse("pyramiddrop", layers=(np.int64(2), np.int64(3)))
    assert tokensieve.parse(str(layered)) == [layered]
