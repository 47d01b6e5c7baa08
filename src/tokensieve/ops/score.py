"""Scores: one number per token, larger means keep."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK = 1024  # rows of a similarity matrix held at once, so that no [N, N] matrix is ever made
BLOCK = 96  # rows of a symmetric matrix computed at once: smaller saves more pairs, larger multiplies faster


def normalise(rows: Tensor) -> Tensor:
    """Rows of length one, float32: `[..., N, D]` to `[..., N, D]`; a zero row stays zero."""
    return normalize(rows.float(), dim=-1)


def rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """`[..., N, D]` and `[..., m]` to `[..., m, D]`; whole rows are copied, on a CPU ten times as fast as a gather."""
    *lead, total, width = rows.shape
    images = math.prod(lead)
    if images > 1:
        index = index + torch.arange(0, images * total, total, device=index.device).view(*lead, 1)
    return rows.reshape(-1, width).index_select(0, index.flatten()).view(*index.shape, width)


@torch.no_grad()
def gram(rows: Tensor) -> Tensor:
    """Dot products of all pairs, `[..., N, D]` to `[..., N, N]`; each pair is computed once. No gradient."""
    total = rows.shape[-2]
    out = rows.new_empty((*rows.shape[:-1], total))
    for start in range(0, total, BLOCK):
        end = min(start + BLOCK, total)
        torch.matmul(rows[..., start:end, :], rows[..., start:, :].mT, out=out[..., start:end, start:])
        out[..., end:, start:end] = out[..., start:end, end:].mT
    return out


def text_similarity(rows: Tensor, text: Tensor, mask: Tensor, query: Literal["tokens", "prompt"]) -> Tensor:
    """Cosine between each token and the prompt, `[..., N]` in [−1, 1].

    Args:
        rows: `[..., N, D]` tokens.
        text: `[..., M, D]` embeddings of the prompt's words.
        mask: `[..., M]` bool, True on real words.
        query: "tokens" takes the best word's cosine, "prompt" the cosine with the words' mean.
    """
    if query == "prompt":
        real = mask[..., None]
        mean = (text.float() * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True)
        return _cosines(rows, mean).squeeze(-1)
    return _cosines(rows, text).masked_fill(~mask[..., None, :], -1).amax(-1)


def _cosines(rows: Tensor, to: Tensor) -> Tensor:
    """`[..., N, D]` and `[..., M, D]` to `[..., N, M]`, without a normalised copy of the many ``rows``."""
    rows = rows.float()
    cosines: Tensor = rows @ normalise(to).transpose(-1, -2) / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return cosines


def local_variance(rows: Tensor, sizes: list[int]) -> Tensor:
    """How much each token's cosines to the other tokens of its stretch vary, `[..., N]` (HoloV's measure of context).

    The cosine of a token with itself counts as 0 among the n, and sums are divided by n − 1.
    O(N·D·min(n, D)) time for stretches of n.

    Args:
        rows: `[..., N, D]`.
        sizes: lengths of the consecutive stretches; they add up to N.
    """
    out = []
    for stretch in torch.split(normalise(rows), sizes, dim=-2):
        n, width = stretch.shape[-2:]
        if n > width:  # sums of cosines and of their squares follow from those of the rows and of their products
            own = stretch.square().sum(-1)
            mean = ((stretch @ stretch.sum(-2)[..., None]).squeeze(-1) - own) / (n - 1)
            squares = (stretch @ (stretch.transpose(-1, -2) @ stretch) * stretch).sum(-1) - own.square()
            out.append((squares - (n - 2) * mean.square()).clamp(min=0) / (n - 1))
            continue
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


def attention(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """Post-softmax attention, float32: `[B, H, T, d]` and `[B, H, N, d]` to `[B, H, T, N]`; ``bias`` is added first."""
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    biased: Tensor = scores if bias is None else scores + bias
    return biased.softmax(-1)


def epsilon_attention(query: Tensor, key: Tensor, bias: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Attention as PuMer's code has it: the mask multiplies after exp, and ε is spread over all keys.

    Differs from :func:`attention` only where a row's strongest key is hidden, since the row's maximum counts that key.
    """
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    weight = (scores - scores.amax(-1, keepdim=True)).exp() * bias.float().exp()
    spread: Tensor = (weight + epsilon / key.shape[-2]) / (weight.sum(-1, keepdim=True) + epsilon)
    return spread


def mask_bias(mask: Tensor, dtype: torch.dtype, queries: int = 0) -> Tensor:
    """The additive attention bias of a mask that may be fractional: its logarithm, so that a weight multiplies.

    Args:
        mask: `[B, N]` in [0, 1]; 0 hides a key.
        dtype: of the bias; hidden keys get its most negative number.
        queries: if given, query i sees key i whatever the mask says, also in cross-attention: a habit of PuMer's code.

    Returns:
        `[B, 1, 1, N]`, or `[B, 1, queries, N]`.
    """
    bias = mask.float().log().clamp(min=torch.finfo(dtype).min).to(dtype)[:, None, None]
    if not queries:
        return bias
    own = torch.eye(queries, mask.shape[-1], dtype=torch.bool, device=mask.device)
    return bias.expand(-1, -1, queries, -1).masked_fill(own, 0)


def text_relevance(text: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Dot product of each image token with the weighted sum of the text: `[B, T, D]`, `[B, I, D]` to `[B, I]`.

    Args:
        weight: `[B, T]`, what each text token counts.
    """
    return (image.float() @ (weight[:, None] @ text.float()).transpose(-1, -2)).squeeze(-1)
