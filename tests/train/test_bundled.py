"""The bundled adapters by their names: each reads the tokens of its method better than the model alone does."""

import json

import pytest
import torch

from tokensieve import parse, reference
from tokensieve.loading import LoadOptions, load_model

pytest.importorskip("peft")

from tokensieve.train.adapter import Recipe
from tokensieve.train.adapter.data import Collator, Questions, read_samples
from tokensieve.train.adapter.loss import answer_logits, answer_loss
from tokensieve.train.adapter.parts import prepared
from tokensieve.train.adapter.run import measure
from tokensieve.train.adapter.schedule import Draw

NAMES = list(reference.ADAPTERS)


@pytest.fixture(scope="module")
def plain():
    return load_model("reference")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_names_no_folder(name):
    folder = reference.adapter_path(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2e6
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "reference"
    record = json.loads((folder / "training.json").read_text())
    assert (record["model"], record["recipe"]["parts"], record["step"]) == ("reference", "lora", 1000)


@pytest.mark.parametrize(
    ("name", "spec", "gain"),
    [("reference-m3", "pool(keep=16)", 0.1), ("reference-demand-cover", "demand-cover(keep=7)", 0.04)],
)
def test_it_reads_tokens_that_the_model_alone_does_not(name, spec, gain, plain):
    """On 39 questions that it was not trained on: those of 3 validation scenes."""
    samples, _ = read_samples("reference:validation[:39]")
    reduced, accuracy = Draw("reduced", tuple(parse(spec))), []
    for model, processor in (plain, load_model("reference", LoadOptions(adapter=name))):
        rows = measure(model, Questions(samples), Collator(processor, "{question}"), [reduced], Recipe(batch_size=39))
        accuracy.append({row["method"]: row["accuracy"] for row in rows})
    untuned, tuned = accuracy
    assert tuned["reduced"] > untuned["reduced"] + gain
    assert tuned["full"] > untuned["full"] - 0.05


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_untouched_by_its_adapter(name, plain):
    with_adapter, _ = load_model("reference", LoadOptions(adapter=name))
    stored = {name.replace(".base_layer", ""): weight for name, weight in with_adapter.state_dict().items()}
    for name, weight in plain[0].state_dict().items():
        assert torch.equal(stored[name], weight)


def test_a_method_that_reads_the_question_acts_in_training():
    """The words change the loss, and a gradient reaches all of the adapter but nothing else."""
    model, processor = load_model("reference")
    tuned = prepared(model, Recipe(rank=2), "reference").train()
    batch = Collator(processor, "{question}")(read_samples("reference:train[:5]")[0])
    losses = {}
    for spec in ("full", "demand-cover(keep=4, text_weight=0)", "demand-cover(keep=4)"):
        losses[spec] = answer_loss(answer_logits(tuned, batch, parse(spec), processor), batch["labels"])
    assert len({round(loss.item(), 4) for loss in losses.values()}) == 3
    losses["demand-cover(keep=4)"].backward()
    for name, weight in tuned.named_parameters():
        assert weight.requires_grad == ("lora_" in name)
        if "lora_B" in name:  # lora_A has no gradient while lora_B is 0, as in the first step
            assert weight.grad.abs().max() > 0, name
        elif "lora_A" not in name:
            assert weight.grad is None
