"""The authors' checkpoints: every name has its place, and what does not fit is said in one line."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import ViltConfig, ViltForImagesAndTextClassification, ViltForQuestionAnswering
from typer.testing import CliRunner

from tests.golden.vectors import FOLDER, load, split_weights
from tests.support.crossmodal import logits
from tokensieve.cli import app
from tokensieve.fusion.convert import build, convert
from tokensieve.fusion.convert.names import renamed
from tokensieve.fusion.meter import MeterForQuestionAnswering


def run(*arguments):
    return CliRunner().invoke(app, ["convert", "pumer", *map(str, arguments)])


@pytest.fixture
def checkpoint():
    """The tiny official ViLT, its settings and what it should say."""
    inputs, outputs, settings = load("pumer_vilt_vqa", "c0")
    inputs, weights = split_weights(inputs)
    given = {
        "input_ids": inputs["text_ids"],
        "attention_mask": inputs["text_masks"],
        "image_embeds": outputs["image_embeds"],
        "pixel_mask": outputs["image_masks"],
    }
    return weights, settings["config"]["num_heads"], given, outputs["logits_full"]


def test_every_name_of_the_full_model_has_its_place():
    listed = json.loads((FOLDER / "pumer_vilt_state_dict_keys.json").read_text())
    with torch.device("meta"):
        model = ViltForQuestionAnswering(ViltConfig(num_labels=3129, layer_norm_eps=1e-6))
        theirs = {entry["name"]: torch.empty(entry["shape"]) for entry in listed["state_dict"]}
        ours = {name: tensor.shape for name, tensor in renamed(theirs, "vilt", "")}
    assert ours == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert sum(shape.numel() for shape in ours.values()) == listed["n_parameters"]


@pytest.mark.parametrize("layout", ["folder", "lightning", "safetensors", "without the prefix"])
def test_convert_from_files(layout, checkpoint, tmp_path):
    weights, heads, given, expected = checkpoint
    source = tmp_path / "theirs"
    source.mkdir()
    if layout == "lightning":
        source = source / "last.ckpt"
        torch.save({"state_dict": {f"model.{name}": weight for name, weight in weights.items()}}, source)
    elif layout == "safetensors":
        from safetensors.torch import save_file

        save_file(weights, source / "model.safetensors")
    else:
        if layout == "without the prefix":
            weights = {name.removeprefix("vilt."): weight for name, weight in weights.items()}
        weights["vilt.text_embeddings.position_ids"] = torch.arange(12)[None]
        torch.save(weights, source / "pytorch_model.bin")
    result = run(source, tmp_path / "ours", "--heads", heads)
    assert result.exit_code == 0, result.output
    model = ViltForQuestionAnswering.from_pretrained(tmp_path / "ours")
    assert_close(logits(model, given), expected, atol=3e-5, rtol=3e-5)


def test_heads_from_the_authors_config(checkpoint, tmp_path):
    weights, heads, given, expected = checkpoint
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": heads}))
    assert_close(logits(convert(tmp_path, tmp_path / "ours"), given), expected, atol=3e-5, rtol=3e-5)


def test_meter(tmp_path):
    inputs, outputs, settings = load("pumer_meter_vqa", "c0")
    inputs, weights = split_weights(inputs)
    torch.save(weights, tmp_path / "theirs.bin")
    result = run(tmp_path / "theirs.bin", tmp_path / "ours", "--heads", settings["config"]["num_heads"])
    assert result.exit_code == 0, result.output
    model = MeterForQuestionAnswering.from_pretrained(tmp_path / "ours")
    names = {"input_ids": "text_ids", "attention_mask": "text_masks", "pixel_values": "pixel_values"}
    given = {ours: inputs[theirs] for ours, theirs in names.items()}
    assert_close(logits(model, given), outputs["logits_full"], atol=3e-5, rtol=3e-5)


def test_pairs_of_images(checkpoint):
    weights, heads, _, _ = checkpoint
    width = 24
    kinds = weights.pop("vilt.token_type_embeddings.weight")
    weights = {name: weight for name, weight in weights.items() if not name.startswith("vqa_classifier")}
    weights["vilt.token_type_embeddings.weight"] = torch.cat([kinds, kinds[1:]])
    shapes = {"0.weight": (48, 2 * width), "0.bias": (48,), "1.weight": (48,), "1.bias": (48,)}
    shapes |= {"3.weight": (2, 48), "3.bias": (2,)}
    weights |= {f"nlvr2_classifier.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    model = build(weights, heads=heads)
    assert isinstance(model, ViltForImagesAndTextClassification)
    assert model.config.num_images == 2
    assert model.num_labels == 2


def test_weights_that_do_not_fit_are_named(checkpoint, tmp_path):
    weights, heads, _, _ = checkpoint
    del weights["vilt.pooler.dense.bias"]
    weights["vilt.extra.weight"] = torch.zeros(1)
    weights["vqa_classifier.1.weight"] = torch.zeros(7)
    torch.save(weights, tmp_path / "theirs.bin")
    result = run(tmp_path / "theirs.bin", tmp_path / "ours", "--heads", heads)
    assert result.exit_code == 2
    for part in (
        "does not fit ViltForQuestionAnswering",
        "1 missing: vilt.pooler.dense.bias",
        "1 unexpected: vilt.extra.weight",
        "1 of another shape: classifier.1.weight is [7], not [48]",
    ):
        assert part in result.output
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no checkpoint at"),
        (b"not a checkpoint", "cannot be read: it is no safetensors file and no state dict"),
        (b"hello\n", "cannot be read: it is no safetensors file and no state dict"),  # "h" reads the unpickler's memo
        (Path("of objects"), "other objects are not loaded, because that would run code"),
        ({"weights": 3}, "no state dict"),
        ({"encoder.weight": torch.zeros(2)}, "no head that we know"),
        ({"vqa_classifier.3.bias": torch.zeros(2)}, "is missing"),
        ({"other_classifier.bias": torch.zeros(2)}, "no head that we know"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused(content, said, tmp_path):
    file = tmp_path / "theirs.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    result = run(file, tmp_path / "ours")
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert "weights_only" not in result.output


def test_never_overwrites(checkpoint, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    result = run(tmp_path, tmp_path / "ours")
    assert result.exit_code == 2
    assert "exists already" in result.output
