"""The contract of methods: evidence belongs to a stage, for the registry and for mypy, and a score is enough."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import tokensieve
from tokensieve.methods import DecoderMethod, DecoderNeeds, EncoderMethod, EncoderNeeds, Method, Needs, ScoreMethod
from tokensieve.methods.needs import StageNeeds
from tokensieve.ops import top_k
from tokensieve.tokens import ConnectorTokens, DecoderTokens

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
