"""The Python examples of the pages run as they are printed, and do what the pages say."""

import re
from pathlib import Path

import pytest

from tokensieve import reference

DOCS = Path(__file__).parents[2] / "docs"
PRINTED = {
    "models.md": r"torch\.bfloat16 \{'dtype': 'bfloat16', 'attn': 'eager', 'processor': \{'do_rescale': True\}\}",
    "pipeline.md": r"green 36\s+\['.*green', '.*1', '.*bottom-right'\] 3",
    "streaming.md": r"green",
    "turns.md": r"red",
    "trainer.md": r"\[36(, 36){7}\]",
    "peft.md": r"36 True\s+True",
}

pytestmark = pytest.mark.skipif(not (reference.path() / "model.safetensors").is_file(), reason="no trained weights")


@pytest.mark.parametrize("page", PRINTED)
def test_an_example_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.S)
    exec(compile(code, page, "exec"), {"__name__": page})
    assert re.search(PRINTED[page], capsys.readouterr().out)
    assert {path.parts[0] for path in (p.relative_to(tmp_path) for p in tmp_path.rglob("*"))} <= {"runs"}


def test_labels_with_a_decoder_method_are_refused_as_the_page_says() -> None:
    import tokensieve
    from tokensieve.evaluate.prompt import left_padded_batch
    from tokensieve.reference.benchmark import benchmark

    model, processor = reference.load()
    row = benchmark(scenes=1)[0]
    inputs = left_padded_batch(processor, [[row.image]], [row.question])
    with (
        tokensieve.attach(model, "fastv"),
        pytest.raises(tokensieve.Refusal, match="labels cannot be given with a decoder method"),
    ):
        model(**inputs, labels=inputs["input_ids"])
