"""Commands on cross-modal encoders that choose among answers: `compare` and `ask`, on untrained weights."""

import json

import pytest
import torch
from typer.testing import CliRunner

import tokensieve
from tokensieve.cli import app
from tokensieve.reference.benchmark import benchmark
from tokensieve.reference.vilt import LABELS, build_model, build_processor

SPEC = "pumer(layers=(1, 4), prune=0.1, merge=0.3, merge_text=0.2)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two untrained ViLTs: one that passes for unreduced, one for fine-tuned."""
    root = tmp_path_factory.mktemp("vilt")
    for seed, name in enumerate(("full", "tuned")):
        build_model(seed).save_pretrained(root / name)
        build_processor().save_pretrained(root / name)
    (root / "tuned" / "tokensieve.json").write_text(json.dumps({"method": SPEC, "task": "vqa"}))
    return root


def test_compare(folder, tmp_path):
    command = ["compare", "--model", str(folder / "tuned"), "--unreduced", str(folder / "full"), "--limit", "7"]
    command += ["--output", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    full, untrained, tuned = json.loads(result.stdout)
    spec = str(tokensieve.parse(SPEC)[0])
    assert [full["method"], untrained["method"], tuned["method"]] == ["full", SPEC, f"{SPEC} fine-tuned"]
    for row in (untrained, tuned):
        assert (row["tokens_before"], row["tokens_after"]) == (145, 52)
        assert row["flops_ratio"] < 0.75
        # both models are paired with the unreduced one
        assert row["prefill_ms"] * row["prefill_speedup"] == pytest.approx(full["prefill_ms"])
        assert row["break_even"] is row["decode_speedup"] is None
        assert row["tokens_average"] == pytest.approx((145 * 2 + 87 * 3 + 52 * 3) / 8)
    assert full["decode_ms_per_token"] is None
    assert full["kv_mb"] is None
    answers = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {line["text"] for line in answers if "text" in line} <= set(LABELS)
    runs = {line["run"] for line in answers if "text" in line}
    assert runs == {"full", spec, f"{spec} fine-tuned"}


def test_other_kinds_are_not_compared(folder, tmp_path):
    command = ["compare", "--model", "reference", "--unreduced", str(folder / "full"), "--limit", "7"]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path), "--no-report"])
    assert result.exit_code == 2
    assert "a LlavaForConditionalGeneration cannot be compared with a ViltForQuestionAnswering" in result.output


def test_ask(folder, tmp_path):
    row = benchmark("validation", scenes=1)[0]
    row.image.save(tmp_path / "scene.png")
    ask = ["ask", str(tmp_path / "scene.png"), row.question, "--model", str(folder / "tuned"), "--json"]
    result = CliRunner().invoke(app, ask)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["answer"] in LABELS
    assert said["answer_full"] in LABELS
    assert (said["tokens_before"], said["tokens_after"]) == (145, 52)


def test_full_counts_and_changes_nothing():
    model = build_model().eval()
    inputs = {"input_ids": torch.arange(7, 14)[None], "pixel_values": torch.randn(1, 3, 120, 120)}
    with torch.no_grad(), tokensieve.attach(model, "full") as sieve:
        reduced = model(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(reduced, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert sieve.last[0][0].whole
    assert sieve.tokens == [[[145] * 8]]
