"""Measure a method on held-out questions, before its net is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokensieve.engine import Sieve
from tokensieve.evaluate import Sample
from tokensieve.evaluate.prompt import decode, encode, generate_arguments, image_numbers, without_repetitions
from tokensieve.loading import to_model

LONGEST = 16  # tokens of an answer


@torch.no_grad()
def score(sieve: Sieve, processor: Any, samples: Sequence[Sample], batch_size: int, prompt: str) -> dict[str, float]:
    """Return the share of right answers, and the visual tokens per image averaged over the layers of the LLM.

    An answer is right if it is one of the sample's, whatever the case.
    """
    model, right, tokens = sieve.model, 0, list[float]()
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        inputs = without_repetitions(
            model, to_model(model, encode(processor, batch, prompt=prompt)), image_numbers(batch)
        )
        arguments = generate_arguments(model, inputs)
        length = arguments["input_ids"].shape[1]
        generated = model.generate(**arguments, max_new_tokens=LONGEST, do_sample=False)
        tokens += [sum(layers) / len(layers) for images in sieve.tokens for layers in images]
        for sample, text in zip(batch, decode(processor, generated, length), strict=True):
            right += text.lower() in [answer.lower() for answer in sample.answers]
    return {"accuracy": right / len(samples), "tokens": sum(tokens) / len(tokens)}
