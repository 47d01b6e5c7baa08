"""Attaching a method warns once of untested releases; what the older releases lack is refused or read another way."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import tokensieve
from tests.support import families, models, prompts
from tokensieve import Refusal
from tokensieve.models import family_of, versions
from tokensieve.version import TESTED

ROOT = Path(__file__).parents[2]


def attach():
    tokensieve.attach(models.tiny_model("llava-clip"), "uniform", keep=9).detach()


@pytest.fixture
def installed(monkeypatch):
    """Return a function that sets the installed releases, as if no warning had been given yet."""
    versions.warn_if_untested.cache_clear()
    tested = {library: f"{highest}.0" for library, (_, highest) in TESTED.items()}

    def install(**changed):
        monkeypatch.setattr(versions, "version", lambda library: (tested | changed)[library])

    yield install
    versions.warn_if_untested.cache_clear()


@pytest.mark.parametrize(
    ("library", "release"),
    [("transformers", "5.19.0"), ("transformers", "5.99.1"), ("transformers", "6.0.0"), ("torch", "2.99.0+cu130")],
)
def test_an_untested_release_is_named_once(library, release, installed):
    installed(**{library: release})
    line = rf"not tested with {library} {re.escape(release)} \(tested: [\d.]+( to [\d.]+)?\); `tokensieve check`"
    with pytest.warns(UserWarning, match=line) as found:
        [attach() for _ in range(2)]
    assert len(found) == 1
    assert found[0].filename == __file__


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("library", list(TESTED))
def test_a_tested_release_is_not(library, end, installed):
    installed(**{library: f"{TESTED[library][end]}.4+cpu"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach()


def test_the_requirements_exclude_no_newer_release():
    """A user's torch or transformers is never replaced by an older one; the lowest tested one may be installed."""
    required = {entry.name: entry.specifier for entry in map(Requirement, _requirements())}
    for library, (lowest, _) in TESTED.items():
        assert {part.operator for part in required[library]} == {">="}
        assert required[library].contains(lowest)
        assert required[library].contains("99.0")
    assert required["transformers"].contains("5.16.1"), "serving engines pin it; the maths runs beside it"


def _requirements():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.S | re.M)
    assert block is not None
    return re.findall(r'"(.+?)"', block[1])


def test_the_constraints_are_tested_releases():
    lines = (ROOT / "constraints-cpu.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    for library, (lowest, highest) in TESTED.items():
        release = Version(pinned[library].removesuffix(".*")).release[:2]
        assert Version(lowest).release <= release <= Version(highest).release, library
    assert pinned["transformers"] == f"{TESTED['transformers'][1]}.*"


def test_a_prompt_whose_images_are_lost_in_chunks_is_refused(monkeypatch):
    """Before 5.23 the chunks of a prompt arrive without their images; simulated on newer releases."""
    monkeypatch.setattr("tokensieve.engine.llm.before_5_23", lambda: True)
    model, text = models.tiny_model("llava-clip"), {"input_ids": torch.tensor([[families.BOS, 20, 21, 22]])}
    chunk = {"input_ids": text["input_ids"].clone()}
    chunk["input_ids"][0, 2] = families.IMAGE
    with tokensieve.attach(model, "uniform", keep=9):
        model(**text)
        with pytest.raises(tokensieve.Refusal, match=r"image tokens but no image.*prefill_chunk_size"):
            model(**chunk)


@pytest.mark.parametrize(
    ("release", "older"), [("5.20.0", True), ("5.22.2", True), ("5.23.0", False), ("6.0.0", False)]
)
def test_the_releases_before_5_23(release, older, installed):
    versions.before_5_23.cache_clear()
    installed(transformers=release)
    assert versions.before_5_23() is older
    versions.before_5_23.cache_clear()


@pytest.mark.parametrize("flag", ["is_activation_checkpointing", "is_gradient_checkpointing"])
def test_gradient_checkpointing_is_found_under_both_names(flag):
    model = type("Model", (), {flag: True})()
    assert versions.checkpoints_activations(model)
    assert not versions.checkpoints_activations(object())


def test_gradient_checkpointing_inside_the_llm_is_refused_before_5_23(monkeypatch):
    monkeypatch.setattr("tokensieve.engine.decoder.hooks.before_5_23", lambda: True)
    model = models.build("llava-clip").train()
    model.gradient_checkpointing_enable()
    inputs = prompts.collate("llava-clip", prompts.batch("llava-clip", "single"))
    with tokensieve.attach(model, "fastv(layer=1, keep=5)"):
        with pytest.raises(tokensieve.Refusal, match="transformers runs hooks twice"):
            model(**inputs, use_cache=False)
        model.eval()
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("release", "model_type", "reason"),
    [
        ("5.17.0", "llava", r"methods need transformers 5\.18 or newer; got 5\.17\.0 \(older releases do not hand"),
        ("5.20.2", "smolvlm", r"methods on 'smolvlm' models need transformers 5\.21 or newer; got 5\.20\.2 \(older"),
    ],
)
def test_a_transformers_that_is_too_old_is_refused(release, model_type, reason, installed):
    installed(transformers=release)
    with pytest.raises(Refusal, match=reason):
        versions.check_release(model_type)
    with pytest.raises(Refusal, match=reason):
        family_of(SimpleNamespace(config=SimpleNamespace(model_type=model_type)))


@pytest.mark.parametrize(
    ("release", "model_type"), [("5.18.0", "llava"), ("5.20.2", "idefics3"), ("5.21.0", "smolvlm")]
)
def test_a_transformers_that_is_new_enough_is_not(release, model_type, installed):
    installed(transformers=release)
    versions.check_release(model_type)
