"""Models that are not plain float32 modules on one device: compiled, offloaded, quantised, copied."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from accelerate import cpu_offload

import tokensieve
from tests.support import models, prompts

FAMILIES = ("llava-clip", "llava-siglip", "qwen2.5-vl")
SPECS = (
    "vtc-cls(first_layer=1, keep=5)",
    "trsm(keep=5)",
    "downsample(keep=5)",
    "fastv(layer=1, keep=5)",
    "visionzip(keep=9) + fastv(layer=2, keep=4)",
)
each_family = pytest.mark.parametrize("family", FAMILIES)
each_spec = pytest.mark.parametrize("spec", SPECS)


def inputs_of(family, kind="ragged"):
    return prompts.collate(family, prompts.batch(family, kind))


def answer(model, inputs, spec):
    with tokensieve.attach(model, spec) as sieve:
        out = model.generate(**inputs, max_new_tokens=4, **prompts.GREEDY)
    return out.sequences, torch.stack(out.logits), [[r.kept for r in row] for row in sieve.last]


def same(one, other, tolerance=0.0):
    assert torch.equal(one[0], other[0])
    assert (one[1] - other[1]).abs().max() <= tolerance
    assert all(torch.equal(a, b) for x, y in zip(one[2], other[2], strict=True) for a, b in zip(x, y, strict=True))


@each_spec
@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl"])  # transformers' own SigLIP head cannot be offloaded
def test_weights_that_come_to_the_device_layer_by_layer(family, spec):
    """As ``device_map`` with offloading does it: between calls every weight is on the meta device."""
    if (family, spec) == ("llava-clip", "downsample(keep=5)"):
        pytest.skip("transformers' own interpolate_pos_encoding reads an offloaded weight directly")
    inputs = inputs_of(family)
    expected = answer(models.tiny_model(family), inputs, spec)
    model = models.build(family)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    same(answer(model, inputs, spec), expected)


@each_spec
@each_family
def test_quantised_layers(family, spec):
    """Linear layers without a float weight: what methods read comes from their outputs."""
    model = models.build(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    inputs = inputs_of(family)
    full = model.generate(**inputs, max_new_tokens=4, **prompts.GREEDY)
    whole = answer(model, inputs, "full")
    assert torch.equal(whole[1], torch.stack(full.logits)), "identity"
    _, logits, kept = answer(model, inputs, spec)
    assert torch.isfinite(logits).all()
    assert kept


@pytest.mark.parametrize(
    ("family", "spec"), [("llava-clip", SPECS[2]), ("llava-clip", SPECS[4]), ("qwen2.5-vl", SPECS[0])]
)
@torch.no_grad()
def test_a_compiled_model(family, spec):
    """Hooks break the graph; what is computed stays the same."""
    inputs, model = inputs_of(family), models.build(family)
    with tokensieve.attach(model, spec):
        expected = model(**inputs).logits
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(**inputs).logits, expected)
        assert torch.equal(compiled(**inputs).logits, expected), "a second call"
    torch.compiler.reset()


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_a_method_on_a_model_that_was_compiled_before(spec):
    """The wrapper of ``torch.compile`` around the model, or around its LLM."""
    inputs = inputs_of("llava-clip")
    expected = answer(models.tiny_model("llava-clip"), inputs, spec)
    inner = models.build("llava-clip")
    whole = torch.compile(inner, backend="eager")
    with tokensieve.attach(whole, spec) as sieve:
        assert sieve.model is inner
        whole(**inputs)
        assert [[r.kept.tolist() for r in row] for row in sieve.last] == [[k.tolist() for k in r] for r in expected[2]]
    same(answer(whole, inputs, spec), expected, 1e-4)
    part = models.build("llava-clip")
    part.model.language_model = torch.compile(part.model.language_model, backend="eager")
    same(answer(part, inputs, spec), expected, 1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("spec", SPECS)
def test_a_detached_model_frees_its_memory_when_it_is_deleted(spec):
    """At once: a cycle of references would hold a GPU's memory until Python happens to look for cycles."""
    model, inputs = models.build("llava-clip"), inputs_of("llava-clip")
    answer(model, inputs, spec)
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        with tokensieve.attach(model, spec) as sieve:
            model(**inputs)
        del model, sieve
        assert alive() is None
    finally:
        gc.enable()


@each_family
def test_an_attached_model_is_not_copied(family):
    """A copy would share hooks with its original, or lose them: neither is what anyone wants."""
    model = models.build(family)
    with tokensieve.attach(model, "uniform", keep=5):
        with pytest.raises(ValueError, match=r"uniform\(keep=5\) is attached to this model; detach\(\) it first"):
            copy.deepcopy(model)
        with pytest.raises(ValueError, match="detach"):
            pickle.dump(model, io.BytesIO())
    same(answer(copy.deepcopy(model), inputs_of(family), "uniform"), answer(model, inputs_of(family), "uniform"))
