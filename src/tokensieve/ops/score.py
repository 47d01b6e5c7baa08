"""Scores: one number per token, larger means keep."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import normalize


def normalise(rows: Tensor) -> Tensor:
    """Rows of length one, float32: `[..., N, D]` to `[..., N, D]`; a zero row stays zero."""
    return normalize(rows.float(), dim=-1)


def text_similarity(rows: Tensor, text: Tensor, mask: Tensor, query: Literal["tokens", "prompt"]) -> Tensor:
    """Cosine between each token and the prompt, `[..., N]` in [−1, 1].

    Args:
        rows: `[..., N, D]` tokens.
        text: `[..., M, D]` embeddings of the prompt's words.
        mask: `[..., M]` bool, True on real words.
        query: "tokens" takes the best word's cosine, "prompt" the cosine with the words' mean.
    """
    rows, real = normalise(rows), mask[..., None]
    if query == "prompt":
        mean = (text.float() * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True)
        return (rows @ normalise(mean).transpose(-1, -2)).squeeze(-1)
    cosines = rows @ normalise(text).transpose(-1, -2)
    return cosines.masked_fill(~mask[..., None, :], -1).amax(-1)
