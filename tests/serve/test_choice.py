"""The choice of a request: the same words choose the same method on vLLM and on transformers."""

from types import SimpleNamespace
from typing import Any

import pytest

from tokensieve import reference
from tokensieve.errors import Refusal
from tokensieve.methods import parse
from tokensieve.serve.embedded import Attached
from tokensieve.vllm import engine_options
from tokensieve.vllm.settings import EngineSettings, unserved


def settings(method: str, allowed: list[str], **parameters: Any) -> EngineSettings:
    """Return the settings that an engine reads in its config."""
    overrides = engine_options("reference", method, allowed=allowed, **parameters)["hf_overrides"]
    return EngineSettings.of_config(SimpleNamespace(**overrides))


@pytest.mark.parametrize(
    ("method", "keep", "allowed"),
    [
        ("vtc-cls", 36, ["divprune"]),
        ("vtc-cls", 36, ["vtc-cls(keep=64)", "full"]),
        ("vtc-cls(keep=36)", None, ["vtc-cls", "divprune(keep=0.50)"]),
        ("vtc-cls(keep=0.50)", None, ["vtc-cls( keep = 9 )"]),
        ("full", None, ["divprune(keep=9)", "divprune(keep=16)"]),
    ],
)
def test_both_engines_choose_the_same_method(method: str, keep: int | None, allowed: list[str]) -> None:
    on_vllm = settings(method, allowed, **({} if keep is None else {"keep": keep}))
    on_transformers = Attached(*reference.load(), method, keep)
    choices: list[dict[str, Any]] = [{}, *({"tokensieve_method": spec} for spec in (method, *allowed))]
    choices += [{**choice, "tokensieve_keep": 25} for choice in choices if "full" not in (method, *choice.values())]
    for choice in choices:
        assert [on_vllm.choose(choice).method] == on_transformers.methods(choice), choice


def test_the_name_alone_and_the_whole_spec_choose_too() -> None:
    engine = settings("vtc-cls(keep=36)", ["divprune(keep=0.50)", "divprune(keep=16)"])
    chosen = [
        str(engine.choose({"tokensieve_method": spec}).method)
        for spec in ("divprune", "divprune(keep=0.5)", "divprune(keep=0.50)", "divprune(keep=16)")
    ]
    assert chosen == ["divprune(keep=0.5)"] * 3 + ["divprune(keep=16)"]
    with pytest.raises(Refusal, match=r"must be one of vtc-cls\(keep=36\), divprune.*; got 'divprune\(keep=9\)'"):
        engine.choose({"tokensieve_method": "divprune(keep=9)"})


@pytest.mark.parametrize("keep", [25, 0.25, 1.0])
def test_a_budget_for_a_method_without_one_is_refused_by_both(keep: float) -> None:
    choice = {"tokensieve_method": "full", "tokensieve_keep": keep}
    for choose in (settings("divprune", ["full"]).choose, Attached(*reference.load(), "divprune").methods):
        with pytest.raises(Refusal, match=f"tokensieve_keep: full has no budget; got {keep}"):
            choose(choice)


def test_a_budget_is_asked_for_only_where_a_method_takes_one() -> None:
    reasons = {name: str(unserved(parse(name)[0])) for name in ("prumerge", "cls-knee", "mustdrop-keys")}
    assert reasons["prumerge"].endswith(": give keep")
    assert reasons["cls-knee"].endswith("before it encodes")
    assert "mustdrop-llm" in reasons["mustdrop-keys"]
