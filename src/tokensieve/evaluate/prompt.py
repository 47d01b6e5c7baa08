"""Questions to model inputs, and generated ids back to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokensieve.evaluate.data import Sample


def encode(processor: Any, samples: Sequence[Sample], *, prompt: str = "{question}") -> dict[str, Tensor]:
    """One left-padded batch of prompts, through the processor's chat template where it has one.

    Args:
        processor: the model's processor; its padding side is not changed.
        samples: one image and one question each.
        prompt: what the user says; ``{question}`` is replaced.
    """
    raise NotImplementedError


def decode(processor: Any, generated: Tensor, prompt_length: int) -> list[str]:
    """Text of what was generated after the prompt: `[B, L]` ids to B strings, special tokens left out."""
    raise NotImplementedError
