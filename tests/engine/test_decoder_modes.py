"""Other ways to run a model with tokens leaving inside it: flash-style masks, an assistant, gradients, the CLI."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import tokensieve
from tests.engine.test_attach import FLASH
from tests.methods.decoder.rules import RULES
from tests.methods.decoder.runs import encode
from tests.support import families, models, oracle, prompts
from tests.support.oracle import NOISE
from tokensieve.cli import app
from tokensieve.evaluate import Sample, calibrate

SPECS = ("fastv(layer=2, keep=0.4)", "pyramiddrop(keep=0.2)", "vtw(layer=3)", "pool-decoder(layer=1, stride=3)")


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("kind", ["ragged", "mixed"])
@pytest.mark.parametrize("family", families.DEEP)
@pytest.mark.parametrize("spec", SPECS)
def test_two_dimensional_masks(spec, family, kind, policy, monkeypatch, deviation):
    """Flash kernels get the 2-D mask as it is, one per length of the cache."""
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, kind))
    with tokensieve.attach(model, spec, positions=policy):
        expected = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
        monkeypatch.setattr(model.model.language_model.config, "_attn_implementation_internal", FLASH)
        got = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
    assert deviation("of 2-D masks", torch.stack(got.logits), torch.stack(expected.logits)) <= NOISE


@pytest.mark.parametrize("spec", ["vtw(layer=3)", "pool-decoder(layer=1, stride=3)"])
def test_an_assistant_changes_nothing_where_no_score_is_read(spec):
    family, torch_seed = "llava-clip-deep", 3
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    torch.manual_seed(torch_seed)
    assistant = LlamaForCausalLM(LlamaConfig(**families.text())).eval()
    with tokensieve.attach(model, spec):
        greedy = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assisted = model.generate(**inputs, max_new_tokens=6, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, greedy)


@pytest.mark.parametrize("family", families.DEEP)
@pytest.mark.parametrize("spec", ["fastv(layer=2, keep=0.4)", "illava-llm(layer=2, keep=0.4)", "pyramiddrop(keep=0.2)"])
def test_gradients_of_a_loss_on_the_logits(spec, family, deviation):
    """Training is possible with a loss of one's own: gradients pass through what is kept, in every block."""
    model, twin = models.build(family), models.build(family)
    (sample,) = prompts.batch(family, "two-images")
    with tokensieve.attach(model, spec):
        model(**prompts.collate(family, [sample]), use_cache=False).logits[0, -1].logsumexp(-1).backward()
    every = [range(image.tokens) for image in sample.images]
    encoded = encode(family, "two-images")[0]
    logits, _ = oracle.run_inside(twin, family, sample, RULES[spec], every, encoded, [], "original")
    logits[-1].logsumexp(-1).backward()
    for number in (0, families.DEPTH - 1):
        got, expected = (m.model.language_model.layers[number].mlp.up_proj.weight.grad for m in (model, twin))
        scale = expected.abs().max()
        assert deviation("of a gradient, relative", got / scale, expected / scale) <= NOISE


def test_calibrate_on_the_command_line(monkeypatch, tmp_path):
    family = "llava-clip-deep"
    inputs = prompts.collate(family, prompts.batch(family, "single"))
    samples = [Sample("one", lambda: None, "what?", ("it",))]
    monkeypatch.setattr("tokensieve.commands.calibrate.load_model", lambda *_: (models.tiny_model(family), None))
    monkeypatch.setattr("tokensieve.evaluate.load_data", lambda *args, **more: samples)
    monkeypatch.setattr(calibrate, "encode", lambda *args, **more: inputs)
    file = tmp_path / "vtw.json"
    call = ["calibrate", "vtw", "--threshold", "1000", "--output", str(file)]
    done = CliRunner().invoke(app, [*call, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["layer"] == 1
    assert json.loads(file.read_text())["samples"] == ["one"]
    assert "←" in CliRunner().invoke(app, call).stdout
    (method,) = tokensieve.parse(f"vtw(calibration={str(file)!r})")
    assert method.layer_numbers(families.DEPTH) == [1]
    refused = CliRunner().invoke(app, [*call[:2], "--threshold", "0", "--output", str(file)])
    assert refused.exit_code == 2
    assert "is good enough" in refused.stderr
