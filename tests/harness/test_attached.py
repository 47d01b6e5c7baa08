"""A method on a harness's model: its options, its counts, and errors that no harness can catch."""

import json
from pathlib import Path

import pytest
import torch

from tests.harness.running import failing
from tokensieve import Refusal, reference
from tokensieve.evaluate.data import load_data
from tokensieve.evaluate.prompt import encode
from tokensieve.harness.attached import Attachment, check_arguments, loud, processor_of, take_options
from tokensieve.methods.spec_file import SpecFile

pytestmark = pytest.mark.skipif(not (reference.path() / "model.safetensors").is_file(), reason="no trained weights")


def asked(attachment: Attachment, processor: object, count: int) -> torch.Tensor:
    inputs = encode(processor, load_data("reference", limit=count))
    return attachment.sieve.model.generate(**inputs, max_new_tokens=2, do_sample=False)


def test_the_record_holds_the_means_per_image() -> None:
    model, processor = reference.load()
    attachment = Attachment(model, processor, method='"fastv(layer=1)"', keep="25%", positions="contiguous")
    empty = attachment.record()
    assert (empty["images"], empty["tokens_before"]) == (0, None)
    asked(attachment, processor, 3)
    inputs = encode(processor, load_data("reference", limit=2))
    model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
    record = attachment.record()
    version = record.pop("version")
    assert version
    assert record == {
        "method": "fastv(keep=0.25, layer=1)",
        "positions": "contiguous",
        "budget_scope": "image",
        "separators": "kept-lines",
        "repair": None,
        "reselect": False,
        "processes": 1,
        "questions": 5,
        "images": 5,
        "tokens_before": 144.0,
        "tokens_after": 36.0,
        "tokens_average": 63.0,
    }


def test_the_record_shows_the_options_of_a_spec_file(tmp_path: Path) -> None:
    options = {"positions": "contiguous", "budget_scope": "sample", "separators": "none", "repair": None}
    (tmp_path / "best.json").write_text(json.dumps(SpecFile("divprune", 36, options).to_json()))
    record = Attachment(*reference.load(), method=str(tmp_path / "best.json")).record()
    assert {name: record[name] for name in ("method", *options)} == {"method": "divprune(keep=36)"} | options
    with pytest.raises(Refusal, match=r"best.json says separators='none'; got separators='kept'"):
        Attachment(*reference.load(), method=str(tmp_path / "best.json"), separators="kept")


def test_a_prompt_without_images_is_a_question() -> None:
    model, processor = reference.load()
    attachment = Attachment(model, processor, method="vtc-cls", keep=36)
    model.generate(**processor.tokenizer(["what?", "where?"], return_tensors="pt"), max_new_tokens=1)
    record = attachment.record()
    assert (record["questions"], record["images"], record["tokens_after"]) == (2, 0, None)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("ValueError('of a bug')", 1, "the run ends, so that no empty answer is scored: ValueError: of a bug"),
        ("MemoryError('no room')", 2, "memory ran out; use a smaller batch size or a smaller budget (no room)"),
        ("__import__('tokensieve').Refusal('not so')", 2, "not so"),
    ],
)
def test_an_error_passes_a_harness_that_catches_exceptions(
    error: str, code: int, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = reference.load()
    attachment = Attachment(model, processor, method=failing(tmp_path, error))

    def harness() -> str:
        try:
            asked(attachment, processor, 1)
        except Exception:
            return ""
        return "answered"

    with pytest.raises(SystemExit) as end:
        harness()
    assert end.value.code == code
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == f"tokensieve: {line}"
    assert ("Traceback" in err) == (code == 1)


def test_options_are_taken_out_of_the_arguments() -> None:
    arguments = {"method": "trsm", "keep": 36, "dtype": "float32", "layer": "1)"}
    assert take_options(arguments) == {"method": "trsm", "keep": 36}
    with pytest.raises(Refusal, match=r"unknown model argument 'layer'.*needs quotes"):
        check_arguments(arguments, ("dtype",))


def test_a_refusal_outside_of_the_model_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, loud():
        raise Refusal("two\nlines")
    assert (end.value.code, capsys.readouterr().err) == (2, "\ntokensieve: two lines\n")


def test_the_processor_of_a_harness_model() -> None:
    class Owner:
        processor = None
        _image_processor = reference.load()[1]

    assert processor_of(Owner()) is Owner._image_processor
    assert processor_of(object()) is None
