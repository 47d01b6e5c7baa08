"""VTW's calibration: the divergences are those of runs with VTW attached, and the result is used."""

import json
import re

import pytest
import torch
from PIL import Image

import tokensieve
from tests.support import families, models, prompts
from tokensieve.evaluate import Sample
from tokensieve.evaluate import calibrate as module
from tokensieve.evaluate.calibrate import Calibration, calibrate_vtw, first_below, withdrawal_kl

FAMILY = "llava-clip-deep"


@pytest.fixture
def inputs_of(monkeypatch):
    """Three samples whose prompts are the laws' own."""
    inputs = {str(i): prompts.collate(FAMILY, [s]) for i, s in enumerate(prompts.batch(FAMILY, "ragged"))}
    monkeypatch.setattr(module, "encode", lambda processor, samples, prompt: inputs[samples[0].id])
    return inputs


@pytest.fixture
def samples():
    return [Sample(str(i), lambda: Image.new("RGB", (8, 8)), "what?", ("it",)) for i in range(3)]


@torch.no_grad()
def test_search(inputs_of, samples, tmp_path):
    model, seen = models.tiny_model(FAMILY), []
    wanted = torch.zeros(families.DEPTH - 1)
    for inputs in inputs_of.values():
        full = model(**inputs).logits[0, -1]
        for layer in range(1, families.DEPTH):
            with tokensieve.attach(model, f"vtw(layer={layer})"):
                wanted[layer - 1] += withdrawal_kl(full, model(**inputs).logits[0, -1]) / 3
    threshold = float(wanted.sort().values[1])
    result = calibrate_vtw(model, None, samples, threshold=threshold * 1.0001, progress=lambda *a: seen.append(a))
    assert result.layers == (1, 2, 3, 4, 5)
    assert torch.allclose(torch.tensor(result.divergence), wanted, rtol=1e-3, atol=1e-6)
    assert result.layer == next(b for b in result.layers if wanted[b - 1] <= threshold * 1.0001)
    assert len(seen) == 3

    file = tmp_path / "vtw.json"
    result.save(file)
    spec = f"vtw(calibration={str(file)!r})"
    with tokensieve.attach(model, spec) as sieve:
        model(**inputs_of["0"])
    assert sieve.tokens[0][0] == [25] * result.layer + [0] * (families.DEPTH - result.layer)
    file.write_text(json.dumps({"layer": 3, "depth": 32}))
    with pytest.raises(ValueError, match="for an LLM of 32 layers; this one has 6"):
        tokensieve.attach(model, spec)


def test_no_layer_is_good_enough(inputs_of, samples, tmp_path):
    result = calibrate_vtw(models.tiny_model(FAMILY), None, samples, threshold=0.0)
    assert result.layer is None
    with pytest.raises(ValueError, match=r"no layer of .* is good enough: the smallest divergence is .*") as refused:
        result.save(tmp_path / "vtw.json")
    suggested = re.search(r"A threshold of (\S+) would choose layer (\d+)", str(refused.value))
    assert suggested is not None
    accepted = first_below(result.layers, result.divergence, float(suggested[1]))
    assert accepted == int(suggested[2])
    assert min(result.divergence) <= float(suggested[1]) <= 1.11 * min(result.divergence)
    with pytest.raises(ValueError, match="at least one sample"):
        calibrate_vtw(models.tiny_model(FAMILY), None, [])
    with pytest.raises(ValueError, match="must be 1 to 5"):
        calibrate_vtw(models.tiny_model(FAMILY), None, samples, first=6)


def test_unwritable(tmp_path):
    from tokensieve.evaluate import OutputError

    with pytest.raises(OutputError, match="cannot write"):
        Calibration(2, 6, 0.1, (1, 2), (0.2, 0.1), ("a",)).save(tmp_path / "missing" / "vtw.json")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"layer": "x", "depth": 4}', '{"layer": 1e400, "depth": 4}', "[" * 200_000]
)
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "vtw.json").write_text(text)
    with pytest.raises(tokensieve.Refusal, match="is no result of 'tokensieve calibrate vtw'"):
        tokensieve.parse("vtw", calibration=str(tmp_path / "vtw.json"))
