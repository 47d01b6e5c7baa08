"""The blind row: the model answers without the image, so that a right answer needed none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tokensieve.errors import first_line
from tokensieve.evaluate.answer import Answerer, Attached
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Answer, Journal
from tokensieve.evaluate.prompt import decode, left_padded_batch, user_turns
from tokensieve.evaluate.rows import FULL
from tokensieve.loading import to_model

if TYPE_CHECKING:
    from tokensieve.evaluate.compare import Comparison


class Blind(Answerer):
    """Answers questions from their text alone: the same chat template, without the image and its tokens.

    Args:
        visual_tokens: returns the visual tokens of a sample in the full model, by the sample's key.
    """

    def __init__(self, *arguments: Any, visual_tokens: Callable[[str], int]) -> None:
        super().__init__(*arguments)
        self.visual_tokens = visual_tokens

    def encode(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return encode_texts(self.processor, samples, self.settings.prompt)

    def finished(self, answers: Mapping[str, Answer]) -> set[str]:
        # an example has no decision to record
        return set(self.keys.values()) & answers.keys()

    def _answer(self, batch: Sequence[Sample], attached: Attached) -> list[Answer]:
        inputs = to_model(self.model, self.encode(batch))
        with torch.inference_mode():
            generated = self.model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=self.settings.max_new_tokens
            )
        texts = decode(self.processor, generated, inputs["input_ids"].shape[1])
        keys: Sequence[str] = [self.keys[sample.id] for sample in batch]
        return [Answer(key, text, self.visual_tokens(key), 0, 0.0) for key, text in zip(keys, texts, strict=True)]


def blind_answerer(comparison: Comparison, keys: Mapping[str, str], journal: Journal) -> Blind:
    """Return the compared model without images. The full model has answered before: its answers hold the tokens."""

    def visual_tokens(key: str) -> int:
        return journal.answers[FULL][key].before

    settings, samples = comparison.settings, comparison.all_samples
    return Blind(comparison.model, comparison.processor, samples, settings, keys, visual_tokens=visual_tokens)


def encode_texts(processor: Any, samples: Sequence[Sample], prompt: str) -> dict[str, torch.Tensor]:
    """Return one left-padded batch of the questions without their images."""
    return left_padded_batch(processor, [()] * len(samples), *user_turns(samples, prompt))


def refusal(model: Any, processor: Any, sample: Sample, prompt: str) -> str:
    """Return why there is no prompt without an image; "" if there is one."""
    if not model.can_generate():
        return "a model that classifies answers reads an image with every question"
    try:
        encode_texts(processor, [sample], prompt)
    except Exception as error:  # processors raise many types
        return f"the processor makes no prompt without an image ({first_line(error)})"
    return ""
