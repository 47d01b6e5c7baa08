"""Scores: one number per token; tokens with larger scores are kept."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK = 1024  # rows of a similarity matrix held at once, so that a long video needs no [N, N] matrix
BLOCK = 96  # rows of a symmetric matrix computed at once: smaller saves more pairs, larger multiplies faster


def normalise(rows: Tensor) -> Tensor:
    """Scale rows `[..., N, D]` to length one, float32; a zero row stays zero."""
    return normalize(rows.float(), dim=-1)


def rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """Select rows, `[..., N, D]` and `[..., m]` to `[..., m, D]`; on a CPU ten times as fast as a gather."""
    *lead, total, width = rows.shape
    images = math.prod(lead)
    if images > 1:  # one index_select over the rows of all images: an index is shifted by the rows of images before
        index = index + torch.arange(0, images * total, total, device=index.device).view(*lead, 1)
    return rows.reshape(-1, width).index_select(0, index.flatten()).view(*index.shape, width)


@torch.no_grad()
def gram(rows: Tensor) -> Tensor:
    """Multiply all pairs of rows, `[..., N, D]` to `[..., N, N]`; computes each pair once and has no gradient."""
    total = rows.shape[-2]
    out = rows.new_empty((*rows.shape[:-1], total))
    for start in range(0, total, BLOCK):
        end = min(start + BLOCK, total)
        torch.matmul(rows[..., start:end, :], rows[..., start:, :].mT, out=out[..., start:end, start:])
        # the matrix is symmetric: the part below the diagonal block is the transpose of the part beside it
        out[..., end:, start:end] = out[..., start:end, end:].mT
    return out


def text_similarity(rows: Tensor, text: Tensor, mask: Tensor, query: Literal["tokens", "prompt"]) -> Tensor:
    """Return the cosine between each token and the prompt, `[..., N]` in [−1, 1].

    Args:
        rows: `[..., N, D]` tokens.
        text: `[..., M, D]` embeddings of the prompt's text tokens.
        mask: `[..., M]` bool, False on padding.
        query: "tokens" returns the largest cosine to a text token, "prompt" the cosine to the mean text token.
    """
    if query == "prompt":
        valid = mask[..., None]
        mean = (text.float() * valid).sum(-2, keepdim=True) / valid.sum(-2, keepdim=True)
        return _cosines(rows, mean).squeeze(-1)
    return _cosines(rows, text).masked_fill(~mask[..., None, :], -1).amax(-1)


def _cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Return the cosines of `[..., N, D]` and `[..., M, D]`, `[..., N, M]`, without a normalised copy of ``rows``."""
    rows = rows.float()
    cosines: Tensor = rows @ normalise(others).transpose(-1, -2) / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return cosines


def local_variance(rows: Tensor, sizes: list[int]) -> Tensor:
    """Return the variance of each token's cosines to the other tokens of its window, `[..., N]` (HoloV's context).

    A token's cosine to itself counts as 0 among the n cosines; sums are divided by n − 1.
    Takes O(N·D·min(n, D)) time for windows of n tokens.

    Args:
        rows: `[..., N, D]`.
        sizes: lengths of the consecutive windows; they add up to N.
    """
    out = []
    for window in torch.split(normalise(rows), sizes, dim=-2):
        n, width = window.shape[-2:]
        if n > width:  # the sums of cosines and of their squares follow from the rows' sum and their [D, D] product
            itself = window.square().sum(-1)  # cosine of each token to itself: 1, or 0 for a zero row
            mean = ((window @ window.sum(-2)[..., None]).squeeze(-1) - itself) / (n - 1)
            squares = (window @ (window.transpose(-1, -2) @ window) * window).sum(-1) - itself.square()
            out.append((squares - (n - 2) * mean.square()).clamp(min=0) / (n - 1))
            continue
        for start in range(0, n, CHUNK):
            cosines = window[..., start : start + CHUNK, :] @ window.transpose(-1, -2)
            cosines.diagonal(start, -2, -1).zero_()
            mean = cosines.sum(-1, keepdim=True) / max(n - 1, 1)
            out.append((cosines - mean).square().sum(-1) / max(n - 1, 1))
    return torch.cat(out, -1)


def without_sinks(scores: Tensor, rows: Tensor, share: float) -> Tensor:
    """Lower the ``scores`` `[..., N]` of attention sinks below all others.

    Attention sinks are a few background patches that draw attention without content. Their features have huge norms, so
    the ``share`` of tokens with the longest rows `[..., N, D]` counts as sinks.
    """
    longest = rows.float().norm(dim=-1).sort(dim=-1, descending=True, stable=True).indices
    sinks = longest[..., : int(share * rows.shape[-2])]
    below = scores.amin(-1, keepdim=True) - 1 - scores.amax(-1, keepdim=True).abs()
    return scores.scatter(-1, sinks, below.expand_as(sinks))


def attention(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return post-softmax attention in float32, `[B, H, T, d]` and `[B, H, N, d]` to `[B, H, T, N]`, with ``bias``."""
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    biased: Tensor = scores if bias is None else scores + bias
    return biased.softmax(-1)


def epsilon_attention(query: Tensor, key: Tensor, bias: Tensor | None = None, epsilon: float = 1e-6) -> Tensor:
    """Return attention as PuMer's code computes it: the mask multiplies after exp, and ε is spread over all keys.

    It differs from :func:`attention` by about ε, and by more in rows whose strongest key is hidden, because the maximum
    includes that key.
    """
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    weight = (scores - scores.amax(-1, keepdim=True)).exp()
    weight = weight if bias is None else weight * bias.float().exp()
    probabilities: Tensor = (weight + epsilon / key.shape[-2]) / (weight.sum(-1, keepdim=True) + epsilon)
    return probabilities


def mask_bias(mask: Tensor, dtype: torch.dtype, queries: int = 0) -> Tensor:
    """Return the logarithm of a mask as an additive attention bias, so that a fractional mask multiplies attention.

    Args:
        mask: `[B, N]` in [0, 1]; 0 hides a key.
        dtype: dtype of the bias; hidden keys get its most negative number.
        queries: if not 0, query i attends to key i whatever the mask is, also in cross-attention, as in PuMer's code.

    Returns:
        `[B, 1, 1, N]`, or `[B, 1, queries, N]`.
    """
    bias = mask.float().log().clamp(min=torch.finfo(dtype).min).to(dtype)[:, None, None]
    if not queries:
        return bias
    diagonal = torch.eye(queries, mask.shape[-1], dtype=torch.bool, device=mask.device)
    return bias.expand(-1, -1, queries, -1).masked_fill(diagonal, 0)


def text_relevance(text: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Multiply each image token with the weighted sum of the text, `[B, T, D]` and `[B, I, D]` to `[B, I]`.

    Args:
        weight: `[B, T]`, weight of each text token.
    """
    return (image.float() @ (weight[:, None] @ text.float()).transpose(-1, -2)).squeeze(-1)
