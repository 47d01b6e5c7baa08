"""Scores: one number per token, larger means keep."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK = 1024  # rows of a similarity matrix held at once, so that no [N, N] matrix is ever made


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


def local_variance(rows: Tensor, sizes: list[int]) -> Tensor:
    """How much each token's cosines to the other tokens of its stretch vary, `[..., N]` (HoloV's measure of context).

    The cosine of a token with itself counts as 0 among the n, and sums are divided by n − 1.

    Args:
        rows: `[..., N, D]`.
        sizes: lengths of the consecutive stretches; they add up to N.
    """
    out = []
    for stretch in torch.split(normalise(rows), sizes, dim=-2):
        n = stretch.shape[-2]
        for start in range(0, n, CHUNK):
            cosines = stretch[..., start : start + CHUNK, :] @ stretch.transpose(-1, -2)
            cosines.diagonal(start, -2, -1).zero_()
            mean = cosines.sum(-1, keepdim=True) / max(n - 1, 1)
            out.append((cosines - mean).square().sum(-1) / max(n - 1, 1))
    return torch.cat(out, -1)


def without_sinks(scores: Tensor, rows: Tensor, share: float) -> Tensor:
    """``scores`` `[..., N]` with the ``share`` of tokens whose `[..., N, D]` rows are longest put below all others.

    A few patches of plain background have huge norms and draw attention without showing anything: attention sinks.
    """
    longest = rows.float().norm(dim=-1).sort(dim=-1, descending=True, stable=True).indices
    sinks = longest[..., : int(share * rows.shape[-2])]
    below = scores.amin(-1, keepdim=True) - 1 - scores.amax(-1, keepdim=True).abs()
    return scores.scatter(-1, sinks, below.expand_as(sinks))
