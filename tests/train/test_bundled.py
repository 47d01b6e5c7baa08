"""The bundled adapter: M3's pooling on the bundled model, by its name."""

import json

import pytest
import torch

from tokensieve import parse, reference
from tokensieve.loading import LoadOptions, load_model

pytest.importorskip("peft")

from tokensieve.train.adapter import Recipe
from tokensieve.train.adapter.data import Collator, Questions, read_samples
from tokensieve.train.adapter.run import measure
from tokensieve.train.adapter.schedule import Draw

FOLDER = reference.adapter_path("reference-m3")


def test_it_is_small_and_names_no_folder():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2e6
    assert json.loads((FOLDER / "adapter_config.json").read_text())["base_model_name_or_path"] == "reference"
    record = json.loads((FOLDER / "training.json").read_text())
    assert (record["model"], record["recipe"]["parts"]) == ("reference", "lora")


def test_it_reads_pooled_tokens_that_the_model_alone_does_not():
    """On 39 questions that it was not trained on: those of 3 validation scenes, at 16 of 144 tokens."""
    samples, _ = read_samples("reference:validation[:39]")
    pooled, accuracy = Draw("pool", tuple(parse("pool(keep=16)"))), []
    for options in (LoadOptions(), LoadOptions(adapter="reference-m3")):
        model, processor = load_model("reference", options)
        rows = measure(model, Questions(samples), Collator(processor, "{question}"), [pooled], Recipe(batch_size=39))
        accuracy.append({row["method"]: row["accuracy"] for row in rows})
    untuned, tuned = accuracy
    assert tuned["pool"] > untuned["pool"] + 0.05
    assert tuned["full"] > untuned["full"] - 0.05


def test_the_model_is_untouched_by_its_adapter():
    with_adapter, plain = (load_model("reference", LoadOptions(adapter=name))[0] for name in ("reference-m3", None))
    stored = {name.replace(".base_layer", ""): weight for name, weight in with_adapter.state_dict().items()}
    for name, weight in plain.state_dict().items():
        assert torch.equal(stored[name], weight)
