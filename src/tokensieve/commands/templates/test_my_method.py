"""Check the promises of every method on the bundled model: identity at keep=1.0, exact budgets, independent rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokensieve
from tokensieve.reference import load

METHOD = "my_method.py:MyMethod"
QUESTIONS = ("how many?", "what colour is the cup?", "what is to the left of the red square?")


@pytest.fixture(autouse=True)
def run_in_this_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)


@pytest.fixture(scope="module")
def bundled() -> Any:
    """Return (model, processor)."""
    return load()


def prompts(processor: Any, rows: range = range(len(QUESTIONS))) -> Any:
    """Return a left-padded batch: each question with an image of its own."""
    pixels = np.random.default_rng(0).integers(256, size=(len(QUESTIONS), 96, 96, 3), dtype=np.uint8)
    turns = []
    for row in rows:
        text = {"type": "text", "text": QUESTIONS[row]}
        turns.append([{"role": "user", "content": [{"type": "image", "image": Image.fromarray(pixels[row])}, text]}])
    padding = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    return processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=padding
    )


@torch.inference_mode()
def test_keep_1_changes_no_bit(bundled: Any) -> None:
    model, processor = bundled
    inputs = prompts(processor)
    before = model(**inputs).logits
    with tokensieve.attach(model, f"{METHOD}(keep=1.0)", processor=processor):
        assert torch.equal(model(**inputs).logits, before)
    assert torch.equal(model(**inputs).logits, before), "detached"


@torch.inference_mode()
@pytest.mark.parametrize(("keep", "tokens"), [(16, 16), (0.25, 36)])
def test_the_budget_is_exact(bundled: Any, keep: float, tokens: int) -> None:
    model, processor = bundled
    inputs = prompts(processor)
    with tokensieve.attach(model, METHOD, keep=keep, processor=processor) as sieve:
        cache = model(**inputs).past_key_values
    for (reduction,) in sieve.last:
        assert reduction.slots == len(set(reduction.kept.tolist())) == tokens
        assert torch.equal(reduction.kept, reduction.kept.sort().values)
    dropped = inputs["input_ids"].shape[1] - cache.layers[-1].keys.shape[-2]
    assert dropped == sieve.last[0][0].total - tokens, "the last layer received a shorter sequence"


@torch.inference_mode()
def test_a_batch_row_equals_its_own_run(bundled: Any) -> None:
    model, processor = bundled
    with tokensieve.attach(model, METHOD, keep=16, processor=processor) as sieve:
        together, kept = model(**prompts(processor)).logits[:, -1], [images[0].kept for images in sieve.last]
        for row in range(len(QUESTIONS)):
            alone = model(**prompts(processor, range(row, row + 1))).logits[0, -1]
            assert torch.equal(sieve.last[0][0].kept, kept[row])
            torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
