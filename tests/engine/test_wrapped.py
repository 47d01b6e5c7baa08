"""Models inside PEFT's wrappers: adapters merged or not, put on before or after a method is attached."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

import tokensieve
from tests.support import models, oracle, prompts
from tokensieve.engine import wrapped
from tokensieve.errors import Refusal

FAMILIES = ("llava-clip", "qwen2.5-vl")
CONNECTOR, DECODER = "vtc-cls(first_layer=1, keep=5)", "fastv(layer=1, keep=5)"
STEPS = 3
each_family = pytest.mark.parametrize("family", FAMILIES)


def lora(family: str, task: str | None = None, **options: Any) -> Any:
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    torch.manual_seed(3)
    return get_peft_model(models.build(family), LoraConfig(task_type=task, **options)).eval()


def loaded(family: str, folder: Path) -> Any:
    lora(family).save_pretrained(folder)
    return PeftModel.from_pretrained(models.build(family), str(folder)).eval()


def merged(family: str) -> Any:
    model = lora(family)
    model.merge_adapter()
    return model


WAYS = {
    "wrapped": lambda family, folder: lora(family),
    "for causal LM": lambda family, folder: lora(family, "CAUSAL_LM"),
    "loaded": loaded,
    "merged in place": lambda family, folder: merged(family),
    "merged and unloaded": lambda family, folder: lora(family).merge_and_unload(),
}


@each_family
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_identity_and_oracle(family: str, way: str, tmp_path: Path, deviation: Any) -> None:
    """Laws 1 and 2, in forward and in generate of the wrapper."""
    model, samples = WAYS[way](family, tmp_path), prompts.batch(family, "ragged")
    inputs, inner = prompts.collate(family, samples), model.get_base_model() if way[-8:] != "unloaded" else model
    plain = model(**inputs).logits
    assert not torch.equal(plain, models.unhooked(family)(**inputs).logits), "the adapter counts"
    hooks = models.hooks(inner)
    with tokensieve.attach(model, "full") as sieve:
        assert torch.equal(model(**inputs).logits, plain)
        assert len(sieve.last) == len(samples)
    for spec in (CONNECTOR, DECODER):
        with tokensieve.attach(model, spec) as sieve:
            prefill = model(**inputs).logits[:, -1]
            out = model.generate(**inputs, max_new_tokens=STEPS, **prompts.GREEDY)
            decisions = sieve.last
        assert torch.equal(model(**inputs).logits, plain)
        assert models.hooks(inner) == hooks
        steps = torch.stack(out.logits, 1)
        assert deviation("oracle under PEFT", prefill, steps[:, 0]) <= oracle.noise(family)
        for row, sample in enumerate(samples):
            kept = [r.kept.tolist() for r in decisions[row]]
            assert [len(k) for k in kept] == [5] * len(kept)
            answer = out.sequences[row, -STEPS:].tolist()[:-1]
            expected = by_hand(inner, family, sample, spec, kept, answer)
            assert deviation("oracle under PEFT", steps[row], expected) <= oracle.noise(family)


def by_hand(model: Any, family: str, sample: Any, spec: str, kept: list[list[int]], answer: list[int]) -> torch.Tensor:
    """The logits of the model itself, fed with the kept rows, or with all of them up to the layer that drops some."""
    if spec == DECODER:
        return oracle.logits_inside(model, family, sample, {1: kept}, answer)
    encoded = [
        oracle.Encoded(image.rows[k], [plane[k] for plane in image.planes])
        for image, k in zip(oracle.encode(model, family, sample), kept, strict=True)
    ]
    return oracle.logits(model, family, sample, kept, encoded, answer)


@each_family
@torch.no_grad()
def test_an_adapter_may_come_and_go_while_a_method_is_attached(family: str) -> None:
    inputs = prompts.collate(family, prompts.batch(family, "ragged"))
    expected = {}
    for name, model in (("adapter", lora(family)), ("none", models.tiny_model(family))):
        with tokensieve.attach(model, CONNECTOR):
            expected[name] = model(**inputs).logits
    base = models.build(family)
    with tokensieve.attach(base, CONNECTOR):
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(base, config).eval()
        assert torch.equal(model(**inputs).logits, expected["adapter"])
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected["none"])
        whole = model.merge_and_unload()
        assert whole is base
        assert (whole(**inputs).logits - expected["adapter"]).abs().max() <= oracle.noise(family)


def test_an_adapter_is_trained_and_saved_while_a_method_is_attached(tmp_path: Path) -> None:
    """The tokens that were dropped have no part in the gradients, and the files hold the adapter alone."""
    model = lora("llava-clip", "CAUSAL_LM").train()
    inputs = prompts.collate("llava-clip", prompts.batch("llava-clip", "ragged"))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with tokensieve.attach(model, CONNECTOR) as sieve:
        model(**inputs, labels=labels).loss.backward()
        assert [r.slots for row in sieve.last for r in row] == [5, 5, 5]
        model.save_pretrained(tmp_path)
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    again = PeftModel.from_pretrained(models.build("llava-clip"), str(tmp_path)).eval()
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def test_a_model_and_its_wrapper_are_one_model() -> None:
    model = lora("llava-clip")
    with (
        tokensieve.attach(model, "uniform", keep=5),
        pytest.raises(Refusal, match=r"uniform\(keep=5\) is attached to this model already"),
    ):
        tokensieve.attach(model.get_base_model(), "uniform")


def test_virtual_tokens_are_refused() -> None:
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=3, token_dim=64, num_attention_heads=4
    )
    with pytest.raises(Refusal, match="PREFIX_TUNING puts virtual tokens in front of the prompt"):
        tokensieve.attach(get_peft_model(models.build("llava-clip"), config), "uniform")


def test_releases_that_pass_hooks_by_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapped, "_installed", lambda: "0.20.0")
    with pytest.raises(Refusal, match=r"peft 0\.20\.0 runs a model past its hooks; install peft>=0\.21"):
        tokensieve.attach(lora("llava-clip"), "uniform")
